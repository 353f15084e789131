"""A step whose loss or gradient is not finite leaves weights and optimiser state as they were, to the bit, on every rank."""

import copy
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import fault_run
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from ranks import train_on_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lightning_modules.gradients import clip_gradients
from lightning_modules.optimizers import make_optimizer
from lightning_modules.skipping import give_gradients_back, spoiled_unless_finite

KINDS = [
    ("adamw", "cpu", torch.float32, False),
    ("adamw", "cpu", torch.float32, True),
    pytest.param("adamw", "cuda", torch.float32, True, marks=pytest.mark.gpu),
    pytest.param("adamw", "cuda", torch.bfloat16, True, marks=pytest.mark.gpu),
    pytest.param("adamw_8bit", "cpu", torch.float32, False),
    pytest.param("adamw_8bit", "cuda", torch.float32, False, marks=pytest.mark.gpu),
    pytest.param("adamw_8bit", "cuda", torch.bfloat16, False, marks=pytest.mark.gpu),
    pytest.param("adamw_bf16", "cuda", torch.bfloat16, False, marks=pytest.mark.gpu),
]


def parts(value: Any) -> list[torch.Tensor]:
    """The plain tensors of an optimiser's value, those within torchao's class one by one."""
    if hasattr(value, "codes"):
        return [value.codes, value.scale]
    return [torch.as_tensor(value)]


class Stepper:
    """Parameters and their optimiser, stepped with gradients drawn by a step's number."""

    def __init__(self, name: str, device: str, dtype: torch.dtype, fused: bool) -> None:
        torch.manual_seed(0)
        # Wide enough that 8 bits hold the moments of the first; the second's stay floats.
        self.parameters = [torch.nn.Parameter(torch.randn(shape).to(device, dtype)) for shape in ((64, 128), (11,))]
        groups = [{"params": [self.parameters[0]], "weight_decay": 0.1}, {"params": [self.parameters[1]], "weight_decay": 0.0}]
        if name == "adamw" and device == "cpu":
            self.optimizer: Any = torch.optim.AdamW(groups, lr=0.1, fused=fused)
        else:
            self.optimizer = make_optimizer(name, groups, 0.1, (0.9, 0.95), 1e-8)

    def step(self, number: int, spoil: float | None = None, clip: tuple[float | None, str] = (1.0, "norm")) -> None:
        generator = torch.Generator().manual_seed(number)
        for parameter in self.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
        if spoil is not None:
            assert self.parameters[1].grad is not None
            self.parameters[1].grad[3] = spoil
        torch.manual_seed(number)  # for stochastic rounding, which all optimisers of a process draw from one source
        self.optimizer.step(lambda: clip_gradients(self.optimizer, *clip))  # within the step, as Lightning does
        give_gradients_back(self.optimizer)

    def tensors(self) -> list[torch.Tensor]:
        state = self.optimizer.state_dict()["state"]
        found = [parameter.detach() for parameter in self.parameters]
        return [copy.deepcopy(part) for value in (*found, *(v for own in state.values() for v in own.values())) for part in parts(value)]


def assert_equal(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(actual) == len(expected) > 0
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("name", "device", "dtype", "fused"), KINDS)
@pytest.mark.parametrize("spoil", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", [(1.0, "norm"), (None, "norm"), (0.1, "value")], ids=str)
def test_a_skipped_step_is_as_none_at_all(
    name: str, device: str, dtype: torch.dtype, fused: bool, spoil: float, clip: tuple[float | None, str]
) -> None:
    if name != "adamw":
        pytest.importorskip("torchao")
    found, expected = Stepper(name, device, dtype, fused), Stepper(name, device, dtype, fused)
    for number in range(2):
        found.step(number, clip=clip)
        expected.step(number, clip=clip)
    for _ in range(2):
        found.step(99, spoil, clip)
        gradient = found.parameters[1].grad
        assert gradient is not None  # there to be looked at
        assert float(gradient[3]) == pytest.approx(spoil, nan_ok=True) or clip[1] == "value"
    assert_equal(found.tensors(), expected.tensors())
    before = found.tensors()
    for number in range(2, 5):
        found.step(number, clip=clip)
        expected.step(number, clip=clip)
    assert_equal(found.tensors(), expected.tensors())
    assert not all(torch.equal(one, other) for one, other in zip(before, found.tensors(), strict=True))  # else this could not fail


@pytest.mark.parametrize("fused", [False, True])
def test_a_first_step_that_is_skipped_does_not_count(fused: bool) -> None:
    found, expected = (Stepper("adamw", "cpu", torch.float32, fused) for _ in range(2))
    found.step(99, math.nan)
    for number in range(3):
        found.step(number)
        expected.step(number)
    assert_equal(found.tensors(), expected.tensors())


def test_an_infinite_loss_spoils_finite_gradients_and_a_finite_one_changes_no_bit() -> None:
    weight = torch.nn.Parameter(torch.tensor([0.3, -1.7]))
    for shift, spoils in ((0.0, False), (math.inf, True), (math.nan, True)):
        loss = (weight**2).sum() + shift
        (expected,) = torch.autograd.grad(loss, weight, retain_graph=True)
        spoiled = spoiled_unless_finite(loss)
        (gradient,) = torch.autograd.grad(spoiled, weight)
        assert gradient.isnan().all() if spoils else torch.equal(gradient, expected)
        assert spoils or torch.equal(spoiled, loss)


@pytest.mark.parametrize("kind", ["nan", "infinite", "overflow"])
@pytest.mark.parametrize(("accumulate", "micro_batch"), [(1, 0), (2, 0), (2, 1)])
def test_a_bad_micro_batch_skips_its_whole_step(kind: str, accumulate: int, micro_batch: int, tmp_path: Path) -> None:
    fault = {"kind": kind, "rank": 0, "step": 2, "micro_batch": micro_batch}
    trainer = fault_run.train({"folder": tmp_path, "faults": [fault], "weights": True, "accumulate_grad_batches": accumulate})
    (result,) = fault_run.results(tmp_path, 1)
    assert trainer.global_step == 6  # the step counts, and the schedule goes on
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 6
    assert result["skipped"] == [1]
    assert [math.isfinite(norm) for norm in result["norms"]] == [True, True, False, True, True, True]
    after = result["after"]
    assert all(torch.equal(after[1][name], after[2][name]) for name in after[1])
    assert not all(torch.equal(after[2][name], after[3][name]) for name in after[2])
    assert all(value.isfinite().all() for value in result["last"].values())


def test_on_one_rank_of_two_it_is_skipped_on_both(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """NaN in a batch of rank 1, later an overflow in a gradient of rank 0: both ranks skip both, count them, and go on as one."""
    faults = [{"kind": "nan", "rank": 1, "step": 2}, {"kind": "overflow", "rank": 0, "step": 4, "micro_batch": 1}]
    options = {"accumulate_grad_batches": 2, "max_steps": 7, "weights": True, "checkpoint_every": 3}
    ranks = train_on_ranks({"folder": tmp_path, "faults": faults, **options}, 2)
    for result in ranks:
        assert result["skipped"] == [2]
        assert [step for step, norm in enumerate(result["norms"]) if not math.isfinite(norm)] == [2, 4]
        for step in range(7):
            before, after = (result["after"][index] for index in (max(0, step - 1), step))
            assert all(torch.equal(before[name], after[name]) for name in before) == (step in (0, 2, 4)), step  # 0: with itself
    assert all(torch.equal(ranks[0]["last"][name], ranks[1]["last"][name]) for name in ranks[0]["last"])
    assert all(value.isfinite().all() for value in ranks[0]["last"].values())
    printed = capfd.readouterr().out
    for step in (2, 4):
        for rank in range(2):
            assert f"step {step} skipped, rank {rank}: loss " in printed
    # The step before the third checkpoint's was skipped: it is written all the same.
    assert {path.name[:11] for path in (tmp_path / "checkpoints").iterdir()} == {"last.ckpt", "step=000006", "step=000007"}


def test_a_run_that_skips_on_and_on_ends_with_a_diagnosis(tmp_path: Path) -> None:
    fault = {"kind": "overflow", "rank": 0, "step": 4, "until": 1000}
    with pytest.raises(
        ValueError, match=r"^3 steps in a row were skipped, up to step 6 \(loss \d\S*, gradient norm inf\): all weights are"
    ) as error:
        fault_run.train({"folder": tmp_path, "faults": [fault], "max_in_row": 3, "max_steps": 100, "checkpoint_every": 2})
    assert "; 1 of 48 gradients are not, the first on the way back network.norm.weight; look at the batches in batches/" in str(error.value)
    assert "\n" not in str(error.value)
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in last["state_dict"].values())


def test_a_row_begins_anew_after_a_good_step_and_the_count_travels_in_the_checkpoint(tmp_path: Path) -> None:
    faults = [{"kind": "nan", "rank": 0, "step": step, "until": step + 2} for step in (1, 4, 7)]
    logger = TensorBoardLogger(tmp_path, name="tb", version="")
    fault_run.train({"folder": tmp_path, "faults": faults, "max_in_row": 3, "max_steps": 12, "checkpoint_every": 100, "logger": logger})
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/skipped_steps")] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 6, 6]
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["callbacks"]["SkippedSteps"] == {"skipped": 6, "in_row": 0}
    assert checkpoint["optimizer_states"][0]["state"][0]["step"] == 6


def test_a_row_goes_on_over_a_checkpoint_within_it(tmp_path: Path) -> None:
    """What the checkpoint says is after all its steps, though each is looked at two steps later."""
    fault = {"kind": "nan", "rank": 0, "step": 4, "until": 1000}
    options = {"folder": tmp_path, "faults": [fault], "max_in_row": 3, "checkpoint_every": 3}
    fault_run.train({**options, "max_steps": 6})
    sixth = tmp_path / "checkpoints" / "last.ckpt"
    callbacks = torch.load(sixth, weights_only=True)["callbacks"]
    assert callbacks["SkippedSteps"] == {"skipped": 2, "in_row": 2}
    (third,) = (tmp_path / "checkpoints").glob("step=000003-*.ckpt")
    assert len(torch.load(third, weights_only=True)["callbacks"]["LossSpikes"]["losses"]) == 3
    with pytest.raises(ValueError, match=r"^3 steps in a row were skipped, up to step 6 "):
        fault_run.train({**options, "max_steps": 100, "resume": sixth})


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("precision", "model"),
    [
        ("bf16-mixed", {}),
        ("bf16-mixed", {"cuda_graph": True}),
        ("bf16-mixed", {"compile_blocks": True}),
        ("bf16-true", {"optimizer": "adamw_8bit"}),
    ],
    ids=["eager", "graph", "compiled", "8bit"],
)
def test_on_a_gpu_a_bad_batch_is_skipped_too(
    precision: str, model: dict[str, Any], accumulate: int, tmp_path: Path, stubs: ModuleType
) -> None:
    """NaN comes in by a row of the embedding that only one batch reads: a graph replays the same kernels, and no hook runs within."""
    if "optimizer" in model:
        pytest.importorskip("torchao")
    poisoned, bad_step = stubs.VOCAB - 1, 5
    batches = [stubs.make_batch(list(range(4 * index, 4 * index + 4))) for index in range(8 * accumulate)]
    for index, batch in enumerate(batches):
        batch["input_ids"].clamp_(max=poisoned - 1)
        batch["labels"].clamp_(max=poisoned - 1)
        if index == bad_step * accumulate:
            batch["input_ids"][0, 0] = poisoned
    module = stubs.make_module({"use_uboo": False, "tie_embeddings": False, "model_dim": 128}, **model)
    record = fault_run.Record(tmp_path, weights=model.get("optimizer") is None)

    class Poison(fault_run.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            with torch.no_grad():
                pl_module.network.embedding.weight[poisoned] = float("inf")

    callbacks = [Poison(), fault_run.SkippedSteps(), record]
    options = {"accelerator": "gpu", "precision": precision, "max_steps": 8, "accumulate_grad_batches": accumulate, "limit_val_batches": 0}
    stubs.make_trainer(tmp_path, callbacks, logger=False, **options).fit(module, DataLoader(batches, batch_size=None))
    assert [step for step, norm in enumerate(record.norms) if not math.isfinite(norm)] == [bad_step]
    assert callbacks[1].skipped == 1
    if record.weights:
        before, after = record.after[bad_step - 1], record.after[bad_step]
        assert all(torch.equal(before[name], after[name]) for name in before)
    rows = [parameter.detach() for name, parameter in module.named_parameters() if name != "network.embedding.weight"]
    assert all(row.isfinite().all() for row in rows)
