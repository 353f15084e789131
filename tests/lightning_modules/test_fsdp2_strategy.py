"""Weights in shards train as whole ones do, and a checkpoint is the same file with them and without."""

import os
from pathlib import Path
from typing import Any

import fault_run
import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from ranks import run_ranks, train_in_processes, train_on_ranks
from stub_run import StubData, make_module, make_trainer
from torch.distributed.tensor import DTensor

from lightning_modules.fsdp2_strategy import FSDP2Strategy
from mmrec.commandline.command_export import run as export

# As in test_strategies.py: rounding must not decide.
MODEL = {"eps": 1e-3, "learning_rate": 1e-3, "network": {"planning_loss": "normalized"}}
STEPS = 10


def options(folder: Path, ranks: int, **changes: Any) -> dict[str, Any]:
    """A run over global batches of eight sequences a step; in shards where there are several ranks."""
    micro_batches = changes.get("accumulate_grad_batches", 1)
    found = {"folder": folder, "max_steps": STEPS, "data": {"batch_size": 8 // ranks // micro_batches}, "model": MODEL, "weights": True}
    return found | ({"strategy": {"fsdp2": True}} if ranks > 1 else {}) | changes


def assert_same_training(found: dict[str, Any], expected: dict[str, Any], limit: float = 1e-5) -> None:
    assert len(found["losses"]) == len(expected["losses"]) > 0
    assert found["losses"] == pytest.approx(expected["losses"], rel=limit)
    assert found["norms"] == pytest.approx(expected["norms"], rel=20 * limit)
    assert expected["losses"][-1] != expected["losses"][0]
    for name, value in expected["after"][0].items():  # after one step, behind which no rounding has had time to grow
        scale = max(float(value.abs().max()), 1e-12)
        assert float((found["after"][0][name] - value).abs().max()) <= limit * 10 * scale, name


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("one")
    fault_run.train(options(folder, 1, checkpoint_every=5))
    return {**fault_run.results(folder, 1)[0], "folder": folder}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("two")
    found = train_on_ranks(options(folder, 2, checkpoint_every=5, limit_val_batches=2), 2)
    assert found[0]["losses"] == found[1]["losses"]
    return {**found[0], "folder": folder}


def test_two_shards_train_as_one_process(one_rank: dict[str, Any], two_ranks: dict[str, Any]) -> None:
    """Though validation came between; every weight and every moment, too."""
    assert_same_training(two_ranks, one_rank)


@pytest.mark.parametrize(
    "changes",
    [
        {"accumulate_grad_batches": 2},
        {"accumulate_grad_batches": 2, "strategy": {"fsdp2": True, "reduce_every_micro_batch": False}},
    ],
    ids=["reduced at once", "reduced once a step"],
)
def test_accumulated_gradients(changes: dict[str, Any], one_rank: dict[str, Any], tmp_path: Path) -> None:
    assert_same_training(train_on_ranks(options(tmp_path, 2, **changes), 2)[0], one_rank)


@pytest.mark.faults
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    "changes", [{}, {"accumulate_grad_batches": 2, "model": {**MODEL, "compile_blocks": True}}], ids=["plain", "compiled"]
)
def test_fifty_steps(ranks: int, changes: dict[str, Any], tmp_path: Path) -> None:
    """Of four ranks some hold nothing of vectors that have an entry a head."""
    fault_run.train(options(tmp_path / "one", 1, max_steps=50))
    expected = fault_run.results(tmp_path / "one", 1)[0]
    found = train_on_ranks(options(tmp_path / "ranks", ranks, max_steps=50, checkpoint_every=25, **changes), ranks)
    assert_same_training(found[0], expected)
    assert all(result["losses"] == found[0]["losses"] for result in found)


@pytest.mark.parametrize("checkpointing", [True, "selective"])
def test_recomputed_activations(checkpointing: bool | str, one_rank: dict[str, Any], tmp_path: Path) -> None:
    """A backward that forms a block again finds its weights."""
    model = MODEL | {"network": {"planning_loss": "normalized", "activation_checkpointing": checkpointing}}
    found = train_on_ranks(options(tmp_path, 2, model=model, max_steps=3), 2)[0]
    assert_same_training(found, {**one_rank, "losses": one_rank["losses"][:3], "norms": one_rank["norms"][:3]})


def test_bf16_weights_beside_fp32_ones(tmp_path: Path) -> None:
    """Time constants stay in fp32, whole on every rank; and here embedding and head are two."""
    model = MODEL | {"network": {"planning_loss": "normalized", "tie_embeddings": False}}
    fault_run.train(options(tmp_path / "one", 1, model=model, precision="bf16-true", max_steps=4))
    expected = fault_run.results(tmp_path / "one", 1)[0]
    changes = {"model": model, "precision": "bf16-true", "max_steps": 4, "checkpoint_every": 4, "accumulate_grad_batches": 2}
    found, other = train_on_ranks(options(tmp_path / "two", 2, **changes), 2)
    assert all(torch.equal(other["last"][name], value) for name, value in found["last"].items())
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-3)
    dtypes = {name: value.dtype for name, value in found["last"].items()}
    assert dtypes == {name: value.dtype for name, value in expected["last"].items()}
    assert {torch.bfloat16, torch.float32} <= set(dtypes.values())
    wide = [name for name, dtype in dtypes.items() if dtype == torch.float32 and name.endswith("exp_avg")]
    for name in wide:  # the mean of the ranks' gradients, as those of one
        assert torch.allclose(found["after"][0][name], expected["after"][0][name], rtol=0.05, atol=1e-5), name
    saved = torch.load(tmp_path / "two" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, found["last"][name]) for name, value in saved.items())


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_both(tmp_path: Path) -> None:
    faults = [{"kind": "nan", "rank": 1, "step": 2}]
    for found in train_on_ranks(options(tmp_path, 2, max_steps=4, faults=faults), 2):
        assert found["skipped"] == [1]
        before, after = found["after"][1], found["after"][2]
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert any(not torch.equal(after[name], found["after"][3][name]) for name in after)


def fit_twice(folder: Path) -> None:
    """On each rank: a module that one Trainer has trained is trained by another; what lies whole, to a file."""
    module = make_module(**MODEL)
    for _ in range(2):
        strategy = FSDP2Strategy()
        trainer = make_trainer(folder, devices=2, strategy=strategy, logger=False, precision="bf16-true", max_steps=2, limit_val_batches=0)
        trainer.fit(module, datamodule=StubData())
        whole = {name: weight for name, weight in module.named_parameters() if not isinstance(weight, DTensor)}
        assert all(ours is weight for ours, weight in zip(strategy._whole, whole.values(), strict=True))
    torch.save(whole, folder / f"{trainer.global_rank}.pt")


def test_a_second_trainer_averages_what_lies_whole(tmp_path: Path) -> None:
    assert run_ranks(fit_twice, 2, tmp_path) == [0, 0]
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert len(one) > 0
    assert all(torch.equal(other[name], value) for name, value in one.items())


# ---- checkpoints


def fifth(folder: Path) -> Path:
    (path,) = (folder / "checkpoints").glob("step=000005-*.ckpt")
    return path


def test_a_checkpoint_is_the_file_that_one_process_writes(one_rank: dict[str, Any], two_ranks: dict[str, Any]) -> None:
    """Names, types and shapes; the numbers are those that the ranks held, to the bit."""
    ours, theirs = (torch.load(run["folder"] / "checkpoints" / "last.ckpt", weights_only=True) for run in (two_ranks, one_rank))
    assert ours.keys() == theirs.keys()
    assert list(ours["state_dict"]) == list(theirs["state_dict"])
    last = two_ranks["last"]
    assert all(torch.equal(value, last[name]) for name, value in ours["state_dict"].items() if name != "network.head.weight")
    assert ours["state_dict"]["network.head.weight"].data_ptr() == ours["state_dict"]["network.embedding.weight"].data_ptr()  # shared
    (state,), (other) = ours["optimizer_states"], theirs["optimizer_states"]
    assert state["param_groups"] == other[0]["param_groups"]
    for index, own in other[0]["state"].items():
        assert {name: (value.shape, value.dtype) for name, value in state["state"][index].items()} == {
            name: (value.shape, value.dtype) for name, value in own.items()
        }
    files = {path.name.partition("-")[0] for path in (two_ranks["folder"] / "checkpoints").iterdir()}
    assert {"last.ckpt", "best.ckpt", "step=000005", "step=000010"} <= files


def test_it_goes_on_in_shards_to_the_bit(two_ranks: dict[str, Any], tmp_path: Path) -> None:
    found = train_on_ranks(options(tmp_path, 2, resume=fifth(two_ranks["folder"])), 2)[0]
    assert found["losses"] == two_ranks["losses"][5:]
    assert all(torch.equal(found["last"][name], value) for name, value in two_ranks["last"].items())


def test_from_shards_to_one_process_and_back(one_rank: dict[str, Any], two_ranks: dict[str, Any], tmp_path: Path) -> None:
    """Moments stay with their weights: at a step's count of six Adam would show it at once."""
    fault_run.train(options(tmp_path / "one", 1, resume=fifth(two_ranks["folder"])))
    alone = fault_run.results(tmp_path / "one", 1)[0]
    assert alone["losses"] == pytest.approx(two_ranks["losses"][5:], rel=1e-5)
    together = train_on_ranks(options(tmp_path / "two", 2, resume=fifth(one_rank["folder"])), 2)[0]
    assert together["losses"] == pytest.approx(one_rank["losses"][5:], rel=1e-5)
    for found, expected in ((alone, two_ranks), (together, one_rank)):
        for name, value in expected["after"][5].items():
            scale = max(float(value.abs().max()), 1e-12)
            assert float((found["after"][0][name] - value).abs().max()) <= 1e-4 * scale, name


def save_again(source: Path, folder: Path) -> None:
    """Take up a checkpoint in shards and write another, with no step between."""
    trainer = fault_run.train(options(folder, 2, devices=2, resume=source, checkpoint_every=99))
    trainer.save_checkpoint(folder / "again.ckpt")


def test_through_shards_and_back_nothing_changes(one_rank: dict[str, Any], tmp_path: Path) -> None:
    """Weights, as they are exported, and moments, to the bit."""
    source = one_rank["folder"] / "checkpoints" / "last.ckpt"
    assert run_ranks(save_again, 2, source, tmp_path) == [0, 0]
    before, after = (torch.load(path, weights_only=True) for path in (source, tmp_path / "again.ckpt"))
    assert before["global_step"] == after["global_step"] == STEPS
    for name, value in before["state_dict"].items():
        assert torch.equal(after["state_dict"][name], value), name
    for index, own in before["optimizer_states"][0]["state"].items():
        for name, value in own.items():
            assert torch.equal(after["optimizer_states"][0]["state"][index][name], value), name
    for path, folder in ((source, "from"), (tmp_path / "again.ckpt", "through")):
        export(["--ckpt_path", str(path), "--output", str(tmp_path / folder)])
    exported = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("from", "through")]
    assert exported[0] == exported[1]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["adamw_8bit", pytest.param("adamw_bf16", marks=pytest.mark.faults)])
def test_lean_moments_travel_too(name: str, tmp_path: Path) -> None:
    """From shards to shards to the bit, and to one process, whose moments are the same numbers; torchao compiles its steps."""
    pytest.importorskip("torchao")
    # Wide enough that a matrix's half is held in 8 bits, and other shards are not.
    network = {"planning_loss": "normalized", "model_dim": 128, "num_heads": 2, "ffn_dim": 128, "num_layers": 1}
    model = {"optimizer": name, "network": network, "learning_rate": 1e-3, "decay_steps": 8}
    changes = {"model": model, "precision": "bf16-true", "max_steps": 4, "checkpoint_every": 2, "weights": False}
    whole = train_in_processes(options(tmp_path / "whole", 2, **changes), 2)[0]
    (second,) = (tmp_path / "whole" / "checkpoints").glob("step=000002-*.ckpt")
    held = torch.load(second, weights_only=True)["optimizer_states"][0]["state"]
    kinds = {type(value) for own in held.values() for value in own.values()}
    assert kinds == ({torch.Tensor, dict} if name == "adamw_8bit" else {torch.Tensor})
    resumed = train_in_processes(options(tmp_path / "resumed", 2, resume=second, **changes), 2)[0]
    assert resumed["losses"] == whole["losses"][2:]
    assert all(torch.equal(resumed["last"][key], value) for key, value in whole["last"].items())
    alone = train_in_processes(options(tmp_path / "one", 1, resume=second, **changes), 1)[0]
    assert alone["losses"] == pytest.approx(whole["losses"][2:], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("precision", "optimizer"), [("32-true", "adamw"), ("bf16-mixed", "adamw"), ("bf16-true", "adamw_8bit")])
def test_the_same_over_nccl(precision: str, optimizer: str, tmp_path: Path) -> None:
    """Two GPUs against one, also where a run goes on from the shards' checkpoint; the blocks overwrite their streams there."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    network = {"planning_loss": "normalized", "model_dim": 128, "num_heads": 2, "ffn_dim": 128, "activation_checkpointing": "selective"}
    model = MODEL | {"network": network, "optimizer": optimizer, "decay_steps": 8}

    def train(name: str, gpus: int, **changes: Any) -> list[float]:
        given = options(tmp_path / name, gpus, model=model, precision=precision, max_steps=6, checkpoint_every=3, weights=False, **changes)
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
        return train_in_processes({**given, "accelerator": "gpu"}, gpus, CUDA_VISIBLE_DEVICES=seen)[0]["losses"]

    limit = 1e-5 if precision == "32-true" else 1e-2
    one, two = train("one", 1), train("two", 2, limit_val_batches=2)
    assert two == pytest.approx(one, rel=limit)
    (third,) = (tmp_path / "two" / "checkpoints").glob("step=000003-*.ckpt")
    assert train("resumed", 2, resume=third) == pytest.approx(two[3:], rel=limit)
    assert train("alone", 1, resume=third) == pytest.approx(two[3:], rel=limit)


# ---- what it refuses


def test_a_config_can_give_every_option() -> None:
    parser = LightningArgumentParser()
    parser.add_subclass_arguments(Strategy, "strategy")
    given = {"gradients": "fp32", "reduce_every_micro_batch": False, "timeout_seconds": 90, "process_group_backend": "gloo"}
    config = parser.parse_object({"strategy": {"class_path": "lightning_modules.fsdp2_strategy.FSDP2Strategy", "init_args": given}})
    strategy = parser.instantiate(config).strategy
    assert isinstance(strategy, FSDP2Strategy)
    assert (strategy.gradients, strategy.reduce_every_micro_batch, strategy.process_group_backend) == ("fp32", False, "gloo")
    assert strategy._timeout is not None
    assert strategy._timeout.total_seconds() == 90
    with pytest.raises(ValueError, match=r"^trainer\.strategy\.timeout_seconds is 0; give a number above 0, at most 2592000$"):
        FSDP2Strategy(timeout_seconds=0)
    with pytest.raises(ValueError, match=r"^trainer\.strategy\.gradients is fp8; give one of full, bf16, fp32$"):
        FSDP2Strategy(gradients="fp8")  # type: ignore[arg-type]


def refusals(folder: Path) -> None:
    """On each rank: what cannot be done with shards says so."""
    with pytest.raises(ValueError, match=r"^model\.cuda_graph: .*; set it to false with FSDP2Strategy$"):
        fault_run.train(options(folder, 2, devices=2, max_steps=1, model={**MODEL, "cuda_graph": True}))
    with pytest.raises(ValueError, match=r"^trainer\.strategy: ModelParallelStrategy does not fit this module; give fsdp2"):
        fault_run.train(options(folder, 2, devices=2, max_steps=1, strategy=ModelParallelStrategy(2, 1)))
    module = fault_run.train(options(folder, 2, devices=2, max_steps=1)).lightning_module
    with pytest.raises(ValueError, match=r"^auxiliary_curves\.gradients_every_n_steps: .*; set it to 0 with FSDP2Strategy$"):
        module.auxiliary_gradient_statistics({})
    with pytest.raises(ValueError, match=r"^set_hem cannot convert weights that lie in shards"):
        module.network.set_hem(False)


def test_what_cannot_be_done_in_shards_is_said(tmp_path: Path) -> None:
    assert run_ranks(refusals, 2, tmp_path) == [0, 0]
