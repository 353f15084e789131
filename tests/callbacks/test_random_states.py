"""Random states travel through a checkpoint that loads with weights_only=True, each rank's own."""

import random
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from callbacks import RandomStates
from callbacks.random_states import KEY, collect_random_states, restore_random_states


def draw() -> tuple[float, ...]:
    """Numbers of every generator, the buffered second normal of `random` and numpy among them."""
    return (
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        float(torch.rand(())),
        float(torch.randn(())),
    )


def test_states_survive_a_file(tmp_path: Path) -> None:
    draw()  # leaves a buffered normal behind
    torch.save(collect_random_states(), tmp_path / "states")
    expected = [draw() for _ in range(3)]
    restore_random_states(torch.load(tmp_path / "states", weights_only=True))
    assert [draw() for _ in range(3)] == expected


def trainer(rank: int, world_size: int, fn: str = "fit") -> Any:
    return SimpleNamespace(state=SimpleNamespace(fn=fn), global_rank=rank, is_global_zero=rank == 0, world_size=world_size)


def test_every_rank_gets_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for rank in range(2):
        torch.manual_seed(rank)
        states.append(collect_random_states())

    def gather(gathered: list[Any], own: Any) -> None:
        gathered[:] = states

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    checkpoint: dict[str, Any] = {}
    RandomStates().on_save_checkpoint(trainer(0, 2), None, checkpoint)
    assert len(checkpoint[KEY]) == 2
    for rank in range(2):
        callback = RandomStates()
        callback.on_load_checkpoint(trainer(rank, 2), None, checkpoint)
        torch.manual_seed(99)
        callback.on_train_start(trainer(rank, 2), None)
        restored = float(torch.rand(()))
        torch.manual_seed(rank)
        assert restored == float(torch.rand(()))


@pytest.mark.parametrize("checkpoint", [{}, {KEY: [None]}])
def test_states_that_do_not_fit_are_reported_and_left(checkpoint: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    callback = RandomStates()
    before = torch.get_rng_state()
    callback.on_load_checkpoint(trainer(0, 2), None, checkpoint)
    (told,) = capsys.readouterr().out.splitlines()
    assert ", this run has 2: random numbers, " in told
    callback.on_train_start(trainer(0, 2), None)
    assert torch.equal(torch.get_rng_state(), before)


def test_validation_leaves_the_random_states_alone(tmp_path: Path, stubs: ModuleType) -> None:
    """The stub's loaders draw a seed when they are iterated, as torch's do."""

    def numbers(folder: Path, **options: Any) -> list[tuple[float, ...]]:
        drawn: list[tuple[float, ...]] = []

        class Draw(Callback):
            def on_train_batch_start(self, *args: Any) -> None:
                drawn.append(draw())

            def on_validation_batch_start(self, *args: Any) -> None:
                draw()

        random.seed(3)
        np.random.seed(3)
        module = stubs.make_module()
        torch.manual_seed(3)
        trainer = stubs.make_trainer(folder, [RandomStates(), Draw()], logger=False, max_steps=5, num_sanity_val_steps=0, **options)
        trainer.fit(module, datamodule=stubs.StubData())
        return drawn

    assert numbers(tmp_path, val_check_interval=2) == numbers(tmp_path, val_check_interval=1000)
