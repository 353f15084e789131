"""Ranks that would go on from different checkpoints go on from none."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from ranks import run_ranks
from stub_run import StubData, make_module, make_trainer

from callbacks import RunCheckpoint, SameCheckpoint


def gathering(monkeypatch: pytest.MonkeyPatch, others: list[str | None]) -> None:
    """Let the other ranks have found what is listed; None: what this one has."""

    def gathered(own: str) -> list[str]:
        return [own, *(own if other is None else other for other in others)]

    monkeypatch.setattr("callbacks.same_checkpoint.gathered", gathered)


THREE = SimpleNamespace(world_size=3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.save({"global_step": 7}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


@pytest.mark.parametrize("there", [True, False])
def test_ranks_that_agree_pass(there: bool, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gathering(monkeypatch, [None, None])
    SameCheckpoint(path if there else None).setup(THREE, None, "fit")


def test_ranks_that_do_not_agree_are_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gathering(monkeypatch, [None, "none"])
    size = path.stat().st_size
    with pytest.raises(
        ValueError, match=rf"^the ranks have found different checkpoints: rank 0 last\.ckpt of {size:,} bytes at step 7, rank 2 none; "
    ):
        SameCheckpoint(path).setup(THREE, None, "fit")


def test_one_process_asks_nobody(path: Path) -> None:
    SameCheckpoint(path).setup(SimpleNamespace(world_size=1), None, "fit")


def go_on(folder: Path, stage: str, steps: list[int]) -> None:
    """On each rank from the checkpoint of another step."""
    trainer = make_trainer(folder, devices=2, strategy="ddp", logger=False)
    (path,) = (folder / "checkpoints").glob(f"step=00000{steps[trainer.global_rank]}-*")
    trainer.callbacks.append(SameCheckpoint(path))
    getattr(trainer, stage)(make_module(), datamodule=StubData(), ckpt_path=str(path))


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_two_ranks(stage: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trainer: Trainer = make_trainer(tmp_path, [RunCheckpoint(every_n_steps=2)], max_steps=4, logger=False)
    trainer.fit(make_module(), datamodule=StubData())
    assert run_ranks(go_on, 2, tmp_path, stage, [4, 4]) == [0, 0]
    assert run_ranks(go_on, 2, tmp_path, stage, [4, 2]) == [1, 1]
    told = capfd.readouterr().err
    assert told.count("ValueError: the ranks have found different checkpoints: rank 0 step=000004") == 2
