"""A run that goes on with other micro-batches a step, or from an older checkpoint, takes whole steps and whole epochs."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from callbacks import RankChange
from callbacks.rank_change import KEY


class Watch(Callback):
    """Which batches of an epoch were read, the steps taken after each, and a checkpoint right behind a step."""

    def __init__(self, save: Path | None = None, step: int = 0) -> None:
        self.save, self.step, self.seen = save, step, []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((batch_idx, trainer.global_step))
        if self.save is not None and trainer.global_step == self.step and not trainer.fit_loop._should_accumulate():
            trainer.save_checkpoint(self.save)


def fit(folder: Path, stubs: ModuleType, watch: Watch, steps: int, accumulate: int, resume: Path | None = None) -> None:
    """Epochs of ten batches."""
    options = {
        "logger": False,
        "limit_train_batches": 10,
        "limit_val_batches": 0,
        "max_steps": steps,
        "accumulate_grad_batches": accumulate,
    }
    trainer = stubs.make_trainer(folder, [RankChange(), watch], **options)
    trainer.fit(stubs.make_module(), datamodule=stubs.StubData(batches=100), ckpt_path=resume)


@pytest.mark.parametrize("accumulate", [2, 4, 5])
def test_the_epoch_behind_an_epochs_last_step_is_a_whole_one(accumulate: int, tmp_path: Path, stubs: ModuleType) -> None:
    """Its steps were of four, four and two batches."""
    fit(tmp_path, stubs, Watch(tmp_path / "end.ckpt", 3), 3, 4)
    resumed = Watch()
    steps = -(-10 // accumulate)
    fit(tmp_path, stubs, resumed, 3 + steps, accumulate, tmp_path / "end.ckpt")
    assert [batch for batch, _ in resumed.seen] == list(range(10))
    assert [step for _, step in resumed.seen] == [3 + min((batch + 1) // accumulate, steps) for batch in range(9)] + [3 + steps]


def without_counts(path: Path, ranks: int) -> Path:
    """The checkpoint as it was written before it said how many micro-batches a step takes, and by so many ranks."""
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint[KEY]
    checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["world_size"] = ranks
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize(("then", "now"), [(2, 4), (4, 2), (3, 1)])
def test_an_older_checkpoint_tells_by_its_counts(then: int, now: int, tmp_path: Path, stubs: ModuleType, capsys: Any) -> None:
    fit(tmp_path, stubs, Watch(tmp_path / "middle.ckpt", 1), 1, then)
    resumed = Watch()
    fit(tmp_path, stubs, resumed, 2, now, without_counts(tmp_path / "middle.ckpt", 2))
    assert len(resumed.seen) == now
    assert f"is of 2 process(es) with {then} micro-batch(es) a step, this run of 1 process(es) with {now} " in capsys.readouterr().out
