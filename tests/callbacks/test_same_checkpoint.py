"""Ranks that would go on from different checkpoints go on from none."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from callbacks import SameCheckpoint


def gathering(monkeypatch: pytest.MonkeyPatch, others: list[str | None]) -> None:
    """Let the other ranks have found what is listed; None: what this one has."""

    def gather(found: list[str], own: str) -> None:
        found[:] = [own, *(own if other is None else other for other in others)]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)


@pytest.fixture
def trainer(tmp_path: Path) -> SimpleNamespace:
    torch.save({"global_step": 7}, tmp_path / "last.ckpt")
    return SimpleNamespace(world_size=3, ckpt_path=str(tmp_path / "last.ckpt"))


@pytest.mark.parametrize("ckpt_path", ["there", None])
def test_ranks_that_agree_pass(ckpt_path: str | None, trainer: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    gathering(monkeypatch, [None, None])
    if ckpt_path is None:
        trainer.ckpt_path = None
    SameCheckpoint().setup(trainer, None, "fit")


def test_ranks_that_do_not_agree_are_named(trainer: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    gathering(monkeypatch, [None, "none"])
    size = Path(trainer.ckpt_path).stat().st_size
    with pytest.raises(
        ValueError, match=rf"^the ranks have found different checkpoints: rank 0 last\.ckpt of {size:,} bytes at step 7, rank 2 none; "
    ):
        SameCheckpoint().setup(trainer, None, "fit")


def test_one_process_asks_nobody(trainer: SimpleNamespace) -> None:
    trainer.world_size = 1
    SameCheckpoint().setup(trainer, None, "fit")
