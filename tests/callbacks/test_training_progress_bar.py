"""Lines where there is no terminal, a bar of steps where there is one."""

import io
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from callbacks import RunCheckpoint, TrainingProgressBar

LINE = r"step (\d+)/(\d+)  loss \d\.\d{3}(  val loss \d\.\d{3})?  tokens/s [\d,]+  \d:\d\d:\d\d left"


def fit(folder: Path, stubs: ModuleType, bar: TrainingProgressBar, resume: Path | None = None, **options: Any) -> None:
    callbacks = [bar, RunCheckpoint(every_n_steps=100)]
    trainer = stubs.make_trainer(folder, callbacks, enable_progress_bar=True, logger=False, **options)
    trainer.fit(stubs.make_module(), datamodule=stubs.StubData(), ckpt_path=resume)


def test_lines_hold_step_loss_speed_and_time_left(tmp_path: Path, stubs: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, stubs, TrainingProgressBar(plain_seconds=0), max_steps=4, accumulate_grad_batches=2)
    output = capsys.readouterr().out
    lines = [line for line in output.splitlines() if line.startswith("step ")]
    assert all(re.fullmatch(LINE, line) for line in lines), lines
    assert [line.split("/")[0] for line in lines] == ["step 1", "step 2", "step 3", "step 4"]
    assert lines[-1].endswith("0:00:00 left")
    assert "\x1b" not in output
    assert "\r" not in output


def test_every_validation_gets_a_line_the_one_before_the_first_step_too(
    tmp_path: Path, stubs: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, stubs, TrainingProgressBar(plain_seconds=1e9), max_steps=4, val_check_interval=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("validation ")]
    assert [re.sub(r"\d\.\d{3}$", "X", line) for line in lines] == [f"validation at step {step}: val/loss X" for step in (0, 2, 4)]


def test_between_two_lines_there_is_silence(tmp_path: Path, stubs: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, stubs, TrainingProgressBar(plain_seconds=1e9), max_steps=5)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split("  ")[0] for line in lines] == ["step 1/5", "step 5/5"]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal would get."""
    buffer = io.StringIO()
    console = Console(file=buffer, force_terminal=True, width=160)
    monkeypatch.setattr("callbacks.training_progress_bar.Console", lambda: console)
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress.get_console", lambda: console)
    return buffer


def test_a_terminal_gets_a_bar_of_steps(
    tmp_path: Path, stubs: ModuleType, terminal: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, stubs, TrainingProgressBar(), max_steps=4)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "4/4" in shown
    assert "loss: 3." in shown
    assert "tokens/s: " in shown
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]


def test_a_resumed_run_goes_on_at_its_step(tmp_path: Path, stubs: ModuleType, terminal: io.StringIO) -> None:
    fit(tmp_path, stubs, TrainingProgressBar(), max_steps=3)
    terminal.truncate(0)
    bar = TrainingProgressBar()
    fit(tmp_path, stubs, bar, tmp_path / "checkpoints" / "last.ckpt", max_steps=8)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "8/8" in shown
    assert "0/8" not in shown


def test_it_can_be_switched_off(tmp_path: Path, stubs: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, stubs, TrainingProgressBar(refresh_rate=0, plain_seconds=0), max_steps=2)
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
