"""Runs of two ranks in processes of their own, signalled on the way."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from processes import environment, session

SCRIPT = Path(__file__).with_name("slow_fit.py")
TWO_RANKS = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
DEADLINE = 120.0  # seconds until a run has come somewhere; the machine may be busy


class Stopped(NamedTuple):
    """How a signalled run ended: its exit code, what it printed, seconds from the first signal to the end, the step it saved."""

    code: int
    output: str
    seconds: float
    step: int


class SlowRun:
    """A `fit` that was started and goes on beside the test.

    Args:
        folder: the run's; what it tells of itself goes beside it.
        config: its config.
        options: further arguments of `fit`.
        step_seconds, stage, pause: see slow_fit.py.
    """

    def __init__(
        self, folder: Path, config: Path, *options: str, step_seconds: float = 0.05, stage: str | None = None, pause: float = 1.0
    ) -> None:
        self.folder, self.marks = folder, folder.with_name(f"{folder.name}.marks")
        self.marks.mkdir(exist_ok=True)
        for old in self.marks.iterdir():
            old.unlink()
        variables = {"SLOW_MARKS": str(self.marks), "SLOW_STEP": str(step_seconds), "SLOW_PAUSE": str(pause)}
        variables |= {"SLOW_STAGE": stage} if stage else {}
        variables["PYTHONFAULTHANDLER"] = "1"  # a run that hangs is ended by SIGABRT, and shows where it was
        command = [sys.executable, str(SCRIPT), "fit", "--config", str(config), "--trainer.default_root_dir", str(folder), *options]
        self.log = (self.marks / "log").open("w+")
        self.process = subprocess.Popen(
            command,
            env=environment(**variables),
            stdout=self.log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            cwd=folder.parent,
        )

    def output(self) -> str:
        """What was printed so far."""
        return (self.marks / "log").read_text()

    def _wait_for(self, name: str, step: int = 0) -> int:
        """The process that wrote a mark, once it has come to the step."""
        end = time.monotonic() + DEADLINE
        while True:
            if (self.marks / name).exists():
                process, *steps = (self.marks / name).read_text().split()
                if int(steps[0] if steps else step) >= step:
                    return int(process)
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < end, f"no {name} of step {step} in {DEADLINE} s: {self.output()}"
            time.sleep(0.005)

    def at_step(self, step: int, ranks: int = 2) -> list[int]:
        """The processes of the ranks, once all have taken so many steps."""
        return [self._wait_for(f"step-{rank}", step) for rank in range(ranks)]

    def at_stage(self, stage: str, ranks: int = 2) -> list[int]:
        """The processes of the first ranks, once they pause in the stage."""
        return [self._wait_for(f"{stage}-{rank}") for rank in range(ranks)]

    def send(self, number: signal.Signals, processes: Sequence[int], skew: float = 0.0) -> Stopped:
        """Signal the processes, the later ones `skew` seconds after, and wait for the end."""
        began = time.monotonic()
        for index, process in enumerate(processes):
            if index:
                time.sleep(skew)
            try:
                os.kill(process, number)
            except ProcessLookupError:
                assert index, "gone before the first signal"
        return self.end(began)

    def end(self, began: float | None = None) -> Stopped:
        """Wait for the end."""
        began = time.monotonic() if began is None else began
        try:
            code = self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGABRT)
            self.process.wait()
            raise AssertionError(f"does not end: {self.output()}") from None
        seconds = time.monotonic() - began
        self.log.close()
        last = self.folder / "checkpoints" / "last.ckpt"
        step = torch.load(last, weights_only=True, mmap=True)["global_step"] if last.exists() else 0
        return Stopped(code, self.output(), seconds, step)

    def everybody(self) -> list[int]:
        """All processes of the run, the data workers among them."""
        return session(self.process.pid)


def weights(folder: Path) -> dict[str, Any]:
    """The parameters in a run's last checkpoint."""
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
