"""`last.ckpt` every N steps and at the end, copies by step and loss, one folder at every restart."""

import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback

from callbacks import RunCheckpoint


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in (folder / "checkpoints").iterdir())


def saved_step(path: Path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


def fit(folder: Path, stubs: ModuleType, resume: str | None = None, keep: int = 2, **options: Any) -> Any:
    checkpoints = RunCheckpoint(every_n_steps=3, keep=keep)
    trainer = stubs.make_trainer(folder, [checkpoints], logger=False, **options)
    trainer.fit(stubs.make_module(), datamodule=stubs.StubData(), ckpt_path=resume)
    return trainer


def test_files_and_names(tmp_path: Path, stubs: ModuleType) -> None:
    trainer = fit(tmp_path, stubs, max_steps=10)
    last, sixth_or_ninth, tenth = names(tmp_path)
    assert last == "last.ckpt"
    assert re.fullmatch(r"step=000009-loss=\d\.\d{3}\.ckpt", sixth_or_ninth)
    assert tenth == f"step=000010-loss={float(trainer.lightning_module.last_step_loss):.3f}.ckpt"
    assert saved_step(tmp_path / "checkpoints" / "last.ckpt") == 10  # always at the end, though 10 is no multiple of 3
    assert os.path.samefile(tmp_path / "checkpoints" / "last.ckpt", tmp_path / "checkpoints" / tenth)
    assert trainer.checkpoint_callback.last_model_path == str(tmp_path / "checkpoints" / "last.ckpt")


def test_the_loss_in_a_name_is_the_mean_of_the_steps_micro_batches(tmp_path: Path, stubs: ModuleType) -> None:
    class Listen(Callback):
        losses: ClassVar[list[float]] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.losses.append(float(pl_module.last_loss.loss))

    checkpoints = RunCheckpoint(every_n_steps=3)
    trainer = stubs.make_trainer(tmp_path, [Listen(), checkpoints], logger=False, max_steps=3, accumulate_grad_batches=2)
    trainer.fit(stubs.make_module(), datamodule=stubs.StubData())
    first, second = Listen.losses[-2:]
    assert f"{second:.3f}" != f"{(first + second) / 2:.3f}"  # else this could not fail
    assert names(tmp_path) == ["last.ckpt", f"step=000003-loss={(first + second) / 2:.3f}.ckpt"]


def test_no_copies(tmp_path: Path, stubs: ModuleType) -> None:
    fit(tmp_path, stubs, keep=0, max_steps=4)
    assert names(tmp_path) == ["last.ckpt"]
    assert saved_step(tmp_path / "checkpoints" / "last.ckpt") == 4


def test_last_finds_it_and_the_run_says_where_it_stands(tmp_path: Path, stubs: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, stubs, max_steps=3)
    assert "resumed" not in capsys.readouterr().out
    fit(tmp_path, stubs, resume="last", max_steps=5)
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert f"resumed from step 3: {last}\n" in capsys.readouterr().out
    assert saved_step(last) == 5
    fit(tmp_path, stubs, resume="last", max_steps=5)  # there is nothing left to do
    assert f"resumed from step 5: {last}\n" in capsys.readouterr().out
    assert len(names(tmp_path)) == 3
    trainer = stubs.make_trainer(tmp_path, [RunCheckpoint()], logger=False)
    trainer.validate(stubs.make_module(), datamodule=stubs.StubData(), ckpt_path="last", verbose=False)
    assert "resumed" not in capsys.readouterr().out


def test_a_run_begun_anew_in_the_folder_keeps_its_own_copies(tmp_path: Path, stubs: ModuleType) -> None:
    fit(tmp_path, stubs, max_steps=9)
    fit(tmp_path, stubs, max_steps=4)
    assert [name[:11] for name in names(tmp_path)] == ["last.ckpt", "step=000003", "step=000004"]
    assert saved_step(tmp_path / "checkpoints" / "last.ckpt") == 4


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_is_an_optimiser_step(accumulate: int, tmp_path: Path, stubs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(RunCheckpoint, "_save_checkpoint", lambda self, trainer, path: steps.append(trainer.global_step))
    monkeypatch.setattr("callbacks.run_checkpoint.link_or_copy", lambda source, target: None)
    fit(tmp_path, stubs, max_steps=7, accumulate_grad_batches=accumulate)
    assert sorted(set(steps)) == [3, 6, 7]


def test_a_run_that_diverged_does_not_replace_a_good_checkpoint(tmp_path: Path, stubs: ModuleType) -> None:
    class Poison(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 4:
                pl_module.network.norm.weight.data.fill_(float("nan"))

    trainer = stubs.make_trainer(tmp_path, [Poison(), RunCheckpoint(every_n_steps=3)], logger=False, max_steps=9)
    with pytest.raises(
        ValueError, match="the largest weight is nan at step 6: nothing was written over the last good checkpoint; resume from it"
    ):
        trainer.fit(stubs.make_module(), datamodule=stubs.StubData())
    assert saved_step(tmp_path / "checkpoints" / "last.ckpt") == 3


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path: Path, stubs: ModuleType) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"^checkpoint folder .*file/checkpoints cannot be written: .*; choose another") as error:
        fit(tmp_path / "file", stubs, max_steps=1)
    assert "\n" not in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_damaged_files_are_put_out_of_the_way_and_last_is_whole_before_the_first_step(tmp_path: Path, stubs: ModuleType) -> None:
    """A run that is killed before its next checkpoint leaves a good folder, and no damaged file outlives a whole one."""

    class Stop(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            raise ZeroDivisionError

    fit(tmp_path, stubs, max_steps=6)
    folder = tmp_path / "checkpoints"
    _last, third, sixth = [folder / name for name in names(tmp_path)]
    os.truncate(sixth, 100)
    checkpoints = RunCheckpoint(every_n_steps=3, damaged=[folder / "last.ckpt", sixth])
    trainer = stubs.make_trainer(tmp_path, [Stop(), checkpoints], logger=False, max_steps=9)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(stubs.make_module(), datamodule=stubs.StubData(), ckpt_path=str(third))
    assert names(tmp_path) == ["last.ckpt", "last.ckpt.damaged", third.name, f"{sixth.name}.damaged"]
    assert os.path.samefile(folder / "last.ckpt", third)


def test_fast_dev_run_writes_nothing(tmp_path: Path, stubs: ModuleType) -> None:
    fit(tmp_path, stubs, fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="checkpoint_every is 0; give at least 1 step"):
        RunCheckpoint(every_n_steps=0)
    with pytest.raises(ValueError, match="keep is -1; give 0 or more copies"):
        RunCheckpoint(keep=-1)


class StopAt(Callback):
    """Asks the run to stop after a batch, or in the validation after it, as EarlyStopping and `max_time` do."""

    def __init__(self, batch: int, in_validation: bool) -> None:
        self.batch, self.in_validation = batch, in_validation

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 == self.batch and not self.in_validation:
            trainer.should_stop = True

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready == self.batch and self.in_validation:
            trainer.should_stop = True


@pytest.mark.parametrize("in_validation", [False, True])
def test_a_run_that_is_to_stop_within_a_step_ends_the_step(in_validation: bool, tmp_path: Path, stubs: ModuleType) -> None:
    """Else the resumed run would take the next step from what was left of its micro-batches."""
    options = {"logger": False, "accumulate_grad_batches": 4, "val_check_interval": 3, "max_steps": 5}

    def fit(folder: Path, callbacks: list[Callback], resume: str | None = None) -> Any:
        trainer = stubs.make_trainer(folder, [*callbacks, RunCheckpoint(every_n_steps=100)], **options)
        trainer.fit(stubs.make_module(), datamodule=stubs.StubData(batches=30), ckpt_path=resume)
        return trainer

    straight = fit(tmp_path / "straight", [])
    stopped = fit(tmp_path / "run", [StopAt(6, in_validation)])
    assert stopped.global_step == 2
    resumed = fit(tmp_path / "run", [], "last")
    for found, expected in zip(resumed.lightning_module.parameters(), straight.lightning_module.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_last_is_put_back_where_the_way_to_it_goes_up(tmp_path: Path, stubs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative folder with `..` in it, as a job's script may give it."""
    (tmp_path / "jobs").mkdir()
    monkeypatch.chdir(tmp_path / "jobs")
    fit(Path("../run"), stubs, max_steps=3)
    folder = tmp_path / "run" / "checkpoints"
    (copy,) = folder.glob("step=*")
    (folder / "last.ckpt").unlink()

    class Look(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            assert (folder / "last.ckpt").exists()

    checkpoints = RunCheckpoint(every_n_steps=100)
    trainer = stubs.make_trainer(Path("../run"), [Look(), checkpoints], logger=False, max_steps=4)
    trainer.fit(stubs.make_module(), datamodule=stubs.StubData(), ckpt_path=f"../run/checkpoints/{copy.name}")
