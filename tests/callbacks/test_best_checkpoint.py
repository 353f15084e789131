"""`best.ckpt`: the checkpoint of the lowest validation loss, kept beside the newest ones, its step and loss known."""

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from callbacks import AtomicCheckpointIO, BackgroundCheckpointIO, RandomStates, RankChange, RunCheckpoint
from mmrec.checkpoint_files import best_copies
from mmrec.files import read_checkpoint


class Validations(Callback):
    """Lets the validations of a run give the losses listed, and keeps the weights that each saw."""

    def __init__(self, losses: list[float]) -> None:
        self.losses, self.weights = list(losses), {}

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            pl_module.last_validation = {"val/loss": self.losses.pop(0)}
            self.weights[trainer.global_step] = pl_module.network.norm.weight.detach().clone()


def fit(folder: Path, stubs: ModuleType, losses: list[float], every: int = 3, resume: str | None = None, **options: Any) -> Validations:
    """A step a batch, a validation every third."""
    validations = Validations(losses)
    callbacks = [RandomStates(), RankChange(), validations, RunCheckpoint(every_n_steps=every, keep_best=True)]
    trainer = stubs.make_trainer(folder, callbacks, **{"logger": False, "max_steps": 3 * len(losses)} | options)
    trainer.fit(stubs.make_module(), datamodule=stubs.StubData(), ckpt_path=resume)
    return validations


def bests(folder: Path) -> list[tuple[int, float]]:
    return [(best.step, best.val_loss) for best in best_copies(folder / "checkpoints")]


@pytest.mark.parametrize("io", [AtomicCheckpointIO, BackgroundCheckpointIO])
@pytest.mark.parametrize("every", [3, 100])
def test_the_best_survives_those_after_it(io: type, every: int, tmp_path: Path, stubs: ModuleType) -> None:
    """Whether the validated step has a checkpoint of its own (every 3) or none."""
    validations = fit(tmp_path, stubs, [3.5, 3.25, 3.375, 3.3, 4.0], every, plugins=[io()])
    folder = tmp_path / "checkpoints"
    assert bests(tmp_path) == [(6, 3.25)]
    assert os.path.samefile(folder / "best.ckpt", folder / "best-step=000006-val_loss=3.250000.ckpt")
    best = read_checkpoint(folder / "best.ckpt")
    assert best["global_step"] == 6
    assert torch.equal(best["state_dict"]["network.norm.weight"], validations.weights[6])
    assert read_checkpoint(folder / "last.ckpt")["global_step"] == 15
    assert {path.name[:11] for path in folder.iterdir()} == {"best.ckpt", "best-step=0", "last.ckpt", "step=000015"} | (
        {"step=000012"} if every == 3 else set()
    )


def test_without_a_validation_there_is_none_and_a_loss_that_is_no_number_is_not_the_best(tmp_path: Path, stubs: ModuleType) -> None:
    fit(tmp_path / "none", stubs, [], max_steps=4, limit_val_batches=0)
    assert not list((tmp_path / "none" / "checkpoints").glob("best*"))
    fit(tmp_path / "nan", stubs, [float("nan"), 3.0])
    assert bests(tmp_path / "nan") == [(6, 3.0)]


def test_a_resumed_run_knows_the_best_and_a_new_one_begins_with_its_own(tmp_path: Path, stubs: ModuleType) -> None:
    fit(tmp_path, stubs, [3.0, 4.0])
    fit(tmp_path, stubs, [3.5, 3.25], resume="last", max_steps=12)
    assert bests(tmp_path) == [(3, 3.0)]
    fit(tmp_path, stubs, [2.5], resume="last", max_steps=15)
    assert bests(tmp_path) == [(15, 2.5)]
    fit(tmp_path, stubs, [5.0])
    assert bests(tmp_path) == [(3, 5.0)]


def test_of_two_that_a_kill_left_the_better_becomes_the_best(tmp_path: Path, stubs: ModuleType) -> None:
    fit(tmp_path, stubs, [3.0])
    folder = tmp_path / "checkpoints"
    (folder / "best-step=000009-val_loss=2.900000.ckpt").write_bytes((folder / "last.ckpt").read_bytes())
    fit(tmp_path, stubs, [2.95], resume="last", max_steps=6)
    assert bests(tmp_path) == [(9, 2.9)]
    assert os.path.samefile(folder / "best.ckpt", folder / "best-step=000009-val_loss=2.900000.ckpt")


def test_keeping_it_in_the_middle_of_a_step_does_not_change_what_a_run_goes_on_from(tmp_path: Path, stubs: ModuleType) -> None:
    """Two micro-batches a step and a validation every third: the second comes between steps, the first and the third within one."""
    options = {"accumulate_grad_batches": 2, "max_steps": 9}
    fit(tmp_path / "straight", stubs, [9.0, 8.0, 7.0, 6.0, 5.0, 4.0], every=4, **options)

    class Interrupt(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 6:
                raise KeyboardInterrupt

    killed = tmp_path / "killed"
    validations = [Validations([9.0, 8.0, 7.0, 6.0]), Interrupt(), RandomStates(), RunCheckpoint(every_n_steps=4, keep_best=True)]
    trainer = stubs.make_trainer(killed, validations, logger=False, **options)
    with pytest.raises(SystemExit):
        trainer.fit(stubs.make_module(), datamodule=stubs.StubData())
    assert read_checkpoint(killed / "checkpoints" / "last.ckpt")["global_step"] == 4
    fit(killed, stubs, [6.5, 6.0, 5.0, 4.0], every=4, resume="last", **options)
    last = [read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"] for folder in (killed, tmp_path / "straight")]
    assert all(torch.equal(last[0][name], value) for name, value in last[1].items())


def test_no_run_goes_on_from_one_within_a_step(tmp_path: Path, stubs: ModuleType) -> None:
    fit(tmp_path, stubs, [9.0, 9.5], max_steps=3, accumulate_grad_batches=2)
    best = tmp_path / "checkpoints" / "best.ckpt"
    with pytest.raises(
        ValueError, match=r"^cannot resume: the checkpoint was written within a step, after 1 of its 2 micro-batches, whose"
    ):
        fit(tmp_path, stubs, [9.0], resume=str(best), accumulate_grad_batches=2)


@pytest.mark.parametrize("io", [AtomicCheckpointIO, BackgroundCheckpointIO])
def test_failures_with_a_best_one_written_between_them_are_not_in_a_row(
    io: type, tmp_path: Path, stubs: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The regular checkpoints of steps 4, 8, 12 and 16 fail; the best ones of 3, 6, 9, 15 and 18 are written."""
    save = AtomicCheckpointIO.save_checkpoint  # in the background also, there by the thread

    def failing(self: Any, checkpoint: dict[str, Any], path: str, storage_options: Any = None) -> None:
        if Path(path).name.startswith("step=") and checkpoint["global_step"] < 18:
            raise OSError(f"cannot write the checkpoint {path}")
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", failing)
    fit(tmp_path, stubs, [9.0, 8.0, 7.0, 7.5, 6.0, 5.0], every=4, plugins=[io()])
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(told) == 4
    assert all("(1 of at most 3 failures in a row)" in line for line in told)
    assert bests(tmp_path) == [(18, 5.0)]


def test_an_evaluation_keeps_nothing(tmp_path: Path, stubs: ModuleType) -> None:
    trainer = stubs.make_trainer(tmp_path, [RunCheckpoint(keep_best=True)], logger=False)
    trainer.validate(stubs.make_module(), datamodule=stubs.StubData(), verbose=False)
    assert list(tmp_path.iterdir()) == []
