"""What each GPU holds and sends under each strategy, and what is advised; the shards' part against what two ranks really hold."""

import json
from pathlib import Path
from typing import Any

import fault_run
import pytest
import torch
from ranks import run_ranks

from callbacks.memory_readings import category_bytes
from mmrec.commandline.configs import config_layers, merge, shipped_config_folder
from mmrec.commandline.memory_estimate import estimate
from mmrec.commandline.memory_plan import advice, asked_by, plans

TUNED = {"class_path": "lightning_modules.strategies.TunedDDPStrategy"}
SHARDED = {"class_path": "lightning_modules.fsdp2_strategy.FSDP2Strategy"}
NETWORK = {"vocab_size": 32, "model_dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 32, "planning_loss": "mse"}


def content(
    strategy: Any = "auto", precision: str = "32-true", optimizer: str = "adamw", accumulate: int = 1, **network: Any
) -> dict[str, Any]:
    return {
        "trainer": {"strategy": strategy, "precision": precision, "accumulate_grad_batches": accumulate},
        "model": {"network": NETWORK | network},
        "data": {"init_args": {"batch_size": 4, "seq_len": 8}},
    }


def by_strategy(given: dict[str, Any], gpus: int) -> dict[str, Any]:
    return {plan.strategy: plan for plan in plans("x", given, gpus)}


@pytest.mark.parametrize(
    ("given", "gpus", "expected"),
    [
        ("auto", 1, "one GPU"),
        (None, 4, "DDP"),
        ("auto", 4, "DDP"),
        ("ddp_find_unused_parameters_true", 2, "DDP"),
        (TUNED, 1, "one GPU"),
        (TUNED, 2, "DDP"),
        (SHARDED, 2, "FSDP2"),
        ("fsdp2", 2, "FSDP2"),
        ("deepspeed", 2, "deepspeed"),
    ],
)
def test_a_configs_strategy_is_named(given: Any, gpus: int, expected: str) -> None:
    assert asked_by(content(given), gpus).kind == expected


def test_data_parallelism_holds_all_and_perhaps_its_gradients_twice() -> None:
    row = estimate("x", content())
    found = by_strategy(content(TUNED), 4)
    assert found["one GPU"].total == found["DDP"].total == row.total
    assert found["one GPU"].sent == 0
    assert found["DDP"].sent == 2 * row.gradients * 3 // 4
    assert by_strategy(content("ddp"), 4)["DDP"].gathered == row.gradients  # Lightning's own keeps gradients beside the buckets
    given = TUNED | {"init_args": {"gradients": "bf16", "gradient_as_bucket_view": False}}
    assert by_strategy(content(given), 4)["DDP"].gathered == row.gradients
    assert by_strategy(content(given), 4)["DDP"].sent == row.gradients * 3 // 4
    assert by_strategy(content(given, "bf16-true"), 4)["DDP"].sent == row.gradients * 3 // 4  # are of bf16 already
    assert list(by_strategy(content(), 1)) == ["one GPU"]


def test_shards_divide_what_is_there_all_the_time() -> None:
    row = estimate("x", content())
    four, eight = (by_strategy(content(), gpus)["FSDP2"] for gpus in (4, 8))
    assert (four.weights, four.gradients, four.optimizer) == tuple(-(-size // 4) for size in (row.weights, row.gradients, row.optimizer))
    assert eight.weights == -(-row.weights // 8)
    assert four.activations == row.activations
    assert four.gathered == eight.gathered > 0
    thrice = by_strategy(content(accumulate=3), 4)["FSDP2"]
    assert thrice.sent == 3 * four.sent
    once = by_strategy(content(SHARDED | {"init_args": {"reduce_every_micro_batch": False}}, accumulate=3), 4)["FSDP2"]
    assert once.gathered == thrice.gathered + row.gradients  # whole ones, until they are summed
    assert once.sent == thrice.sent - 2 * row.gradients * 3 // 4


def test_autocasts_copies_are_whole_where_blocks_are_not_formed_again() -> None:
    row = estimate("x", content(precision="bf16-mixed"))
    plain = by_strategy(content(precision="bf16-mixed"), 4)["FSDP2"]
    again = by_strategy(content(precision="bf16-mixed", activation_checkpointing=True, num_layers=8), 4)["FSDP2"]
    wide = by_strategy(content(activation_checkpointing=True, num_layers=8), 4)["FSDP2"]
    assert plain.weights == -(-4 * row.parameters // 4)  # no copies in the shards
    assert plain.gathered == by_strategy(content(), 4)["FSDP2"].gathered + 2 * row.parameters
    assert 0 < again.gathered - wide.gathered < 2 * row.parameters * 4


def held(folder: Path) -> None:
    """Of rank 0, after a step: bytes by category."""
    options = {"folder": folder, "max_steps": 1, "devices": 2, "strategy": {"fsdp2": True}, "model": {"network": {"planning_loss": "mse"}}}
    trainer = fault_run.train(options)
    if trainer.global_rank == 0:
        torch.save(category_bytes(trainer.lightning_module, trainer.optimizers), folder / "held.pt")


def test_two_ranks_hold_what_the_plan_says(tmp_path: Path) -> None:
    assert run_ranks(held, 2, tmp_path) == [0, 0]
    found, plan = torch.load(tmp_path / "held.pt"), by_strategy(content(), 2)["FSDP2"]
    assert found["parameters"] == plan.weights
    assert found["optimizer state"] == pytest.approx(plan.optimizer, rel=0.01)  # and counts of steps
    assert found["gradients"] == plan.gradients


@pytest.mark.parametrize(
    ("given", "memory", "expected"),
    [
        (content(TUNED), 1e12, "It fits, and nothing that fits sends less: keep it."),
        (
            content(SHARDED),
            1e12,
            "Take DDP (trainer.strategy.class_path: lightning_modules.strategies.TunedDDPStrategy): it fits, and sends less.",
        ),
        (content(TUNED), 0.0, "Nothing fits: FSDP2 comes nearest with"),
    ],
)
def test_what_sends_least_and_fits_is_advised(given: dict[str, Any], memory: float, expected: str) -> None:
    assert advice(plans("x", given, 4), asked_by(given, 4).kind, memory).startswith(expected)


def test_where_only_shards_fit_they_are_advised() -> None:
    given = content(TUNED)
    found = by_strategy(given, 4)
    between = 1.05 * (found["DDP"].total + found["FSDP2"].total) / 2
    assert found["FSDP2"].fits(between)
    assert not found["DDP"].fits(between)
    assert advice(list(found.values()), "DDP", between) == ("Take FSDP2 (trainer.strategy: fsdp2): it is the one that fits.")


def test_the_command_explains(cli) -> None:
    printed = cli("configs", "--explain", "a100_7b", "--gpus", "8", "--gpu-memory", "80")
    assert printed.code == 0, printed.err
    for text in ("one GPU", "DDP", "FSDP2", "13.2", "a100_7b uses DDP on 8 GPUs. It fits, and nothing that fits sends less: keep it."):
        assert text in printed.out
    answer = json.loads(cli("configs", "--explain", "a100_7b_fsdp2", "--gpus", "4", "--gpu-memory", "48", "--json").out)
    assert answer["strategy"] == "FSDP2"
    assert {plan["strategy"]: plan["fits"] for plan in answer["plans"]} == {"one GPU": False, "DDP": False, "FSDP2": False}
    alone = cli("configs", "--explain", "cpu_tiny")
    assert alone.out.strip().endswith("cpu_tiny on one GPU. It fits, and nothing that fits sends less: keep it.")


def test_the_command_refuses_in_one_line(cli) -> None:
    assert cli("configs", "--explain", "nope").error.startswith("no config nope. Shipped ones: a100_7b,")
    assert cli("configs", "--explain", "cpu_tiny", "debug").error == "--explain explains one config, cpu_tiny; leave debug out"
    assert cli("configs", "--explain", "cpu_tiny", "--gpus", "0").error == "gpus: expected a whole number above 0, got 0"
    Path("bad.yaml").write_text("model: {network: {model_dimm: 3}}\n")
    assert cli("configs", "--explain", "bad.yaml").error.startswith("config bad.yaml: ")


@pytest.mark.parametrize("command", [("configs",), ("configs", "--explain")])
def test_an_overlay_is_no_network_of_the_default_sizes(command: tuple[str, ...], cli) -> None:
    folder = shipped_config_folder()
    overlays = [path.relative_to(folder).with_suffix("").as_posix() for path in sorted(folder.glob("*/*.yaml"))]
    kinds = {name: name.partition("/")[0] for name in overlays}
    assert set(kinds.values()) == {"ablation", "baselines", "recall"}
    for name in overlays if command == ("configs",) else ("ablation/dpg", "ablation/uboo_last", "baselines/gla_35m", "recall/mqar"):
        printed = cli(*command, name)
        if kinds[name] == "recall":
            assert printed.code == 0, printed.err
        elif kinds[name] == "ablation":
            assert printed.error.startswith(f"config {name} gives no model.network.model_dim or num_layers: it is an overlay")
        else:
            assert printed.error.startswith(f"config {name} is an overlay of a baseline, whose memory is not estimated; ")
        assert "lambda_P" not in printed.err  # no word of a network of other sizes
    Path("both.yaml").write_text("base: [study_35m, ablation/window_256]\n")  # as the line says
    assert cli(*command, "both.yaml").code == 0
    Path("bad.yaml").write_text("model: {network: {model_dimm: 3}}\n")
    assert "unexpected keyword argument 'model_dimm'" in cli(*command, "bad.yaml").error


def test_the_largest_config_fits_in_shards_where_it_does_not_whole() -> None:
    given = merge(config_layers("a100_7b_fsdp2"))
    found = by_strategy(given, 8)
    assert not found["DDP"].fits(48e9)
    assert found["FSDP2"].fits(48e9)
