"""Ranks that share a batch train as one process that has it all; the strategy's options change no curve but by rounding."""

from pathlib import Path
from typing import Any

import fault_run
import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import Strategy
from ranks import train_on_ranks

from lightning_modules.strategies import TunedDDPStrategy

# With a large ε, Adam does not turn the rounding of tiny gradients into steps of full size; at ten times this rate the network's path is
# unstable, and rounding alone drives two runs apart by a thousandth within fifty steps.
MODEL = {"eps": 1e-3, "learning_rate": 1e-3, "network": {"planning_loss": "normalized"}}


def curve(folder: Path, ranks: int, steps: int, **options: Any) -> dict[str, Any]:
    """Losses and norms of a run over global batches of eight sequences a step."""
    micro_batches = options.get("accumulate_grad_batches", 1)
    settings = {"max_steps": steps, "data": {"batch_size": 8 // ranks // micro_batches}, "model": MODEL, **options}
    if ranks == 1:
        fault_run.train({"folder": folder, **settings})
    found = fault_run.results(folder, 1) if ranks == 1 else train_on_ranks({"folder": folder, **settings}, ranks)
    for result in found[1:]:
        assert result["losses"] == found[0]["losses"]
        assert all(torch.equal(result["last"][name], value) for name, value in found[0]["last"].items())
    return found[0]


def assert_same_curve(found: dict[str, Any], expected: dict[str, Any], limit: float = 1e-5) -> None:
    assert len(found["losses"]) == len(expected["losses"]) > 0
    assert found["losses"] == pytest.approx(expected["losses"], rel=limit)
    assert found["norms"] == pytest.approx(expected["norms"], rel=20 * limit)
    assert expected["losses"][-1] != expected["losses"][0]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return curve(tmp_path_factory.mktemp("one"), 1, 10)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strategy": {"static_graph": True}},
        {"accumulate_grad_batches": 2},
        {"accumulate_grad_batches": 2, "strategy": {"static_graph": True, "bucket_cap_mb": 1}},
    ],
    ids=["plain", "static", "accumulated", "accumulated-static"],
)
def test_two_ranks_train_as_one(options: dict[str, Any], one_rank: dict[str, Any], tmp_path: Path) -> None:
    assert_same_curve(curve(tmp_path, 2, 10, **options), one_rank)


def test_ranks_count_equally_whatever_their_number_of_labels(tmp_path: Path) -> None:
    """As the micro-batches of one process do, of which each is a rank's share."""
    expected = curve(tmp_path / "one", 1, 6, uneven=True, accumulate_grad_batches=2)
    assert_same_curve(curve(tmp_path / "two", 2, 6, uneven=True), expected)
    together = curve(tmp_path / "together", 1, 6, uneven=True)  # where each label counts equally
    assert together["losses"] != pytest.approx(expected["losses"], rel=1e-3)


def test_gradients_in_bf16_are_close_but_not_the_same(one_rank: dict[str, Any], tmp_path: Path) -> None:
    found = curve(tmp_path, 2, 10, strategy={"gradients": "bf16"})
    assert_same_curve(found, one_rank, limit=2e-2)
    assert found["losses"][1:] != pytest.approx(one_rank["losses"][1:], rel=1e-7)


@pytest.mark.faults
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strategy": {"static_graph": True}},
        {"accumulate_grad_batches": 2},
        {"accumulate_grad_batches": 2, "model": {**MODEL, "compile_blocks": True}},
        {"accumulate_grad_batches": 2, "model": {**MODEL, "cuda_graph": True}},
    ],
    ids=["plain", "static", "accumulated", "compiled", "graph asked for"],
)
def test_fifty_steps(ranks: int, options: dict[str, Any], tmp_path: Path) -> None:
    """A CPU, and more than one rank, does without a CUDA graph."""
    expected = curve(tmp_path / "one", 1, 50)
    assert_same_curve(curve(tmp_path / "ranks", ranks, 50, **options), expected)


def test_a_config_can_give_every_option() -> None:
    parser = LightningArgumentParser()
    parser.add_subclass_arguments(Strategy, "strategy")
    options = {"gradients": "bf16", "static_graph": True, "gradient_as_bucket_view": False, "bucket_cap_mb": 50, "timeout_seconds": 90}
    config = parser.parse_object({"strategy": {"class_path": "lightning_modules.strategies.TunedDDPStrategy", "init_args": options}})
    strategy = parser.instantiate(config).strategy
    assert isinstance(strategy, TunedDDPStrategy)
    assert strategy.gradients == "bf16"
    assert strategy._ddp_kwargs == {"static_graph": True, "gradient_as_bucket_view": False, "bucket_cap_mb": 50}
    assert strategy._timeout is not None
    assert strategy._timeout.total_seconds() == 90


def test_a_timeout_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^trainer\.strategy\.timeout_seconds is 0; give a number above 0, at most 2592000$"):
        TunedDDPStrategy(timeout_seconds=0)
