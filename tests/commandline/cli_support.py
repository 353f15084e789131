"""Calling the command line within the test's process, and reading what a run wrote."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mmrec.commandline.trainer_cli  # noqa: F401  Lightning's logger keeps the standard error that it finds when imported
from mmrec.cli import main

VOCABULARY = 300


class Result(NamedTuple):
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error; fails where there is more on the standard error than that."""
        lines = self.err.splitlines()
        assert self.code == 2, f"exit code {self.code}: {self.err}"
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), lines[0]
        return lines[0].removeprefix("error: ")


class CommandLine:
    """Calls `main` and catches how it ends."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str) -> Result:
        self._capsys.readouterr()
        code = 0
        try:
            main(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        captured = self._capsys.readouterr()
        return Result(code, captured.out, captured.err)


def fit(config: Path, *options: str) -> None:
    """`fit` with one thread."""
    torch.set_num_threads(1)
    main(["fit", "--config", str(config), *options])


def event_files(run: Path) -> list[Path]:
    """Event files of a run, oldest first: a name holds the second it was made, then the process, then a counter."""
    return sorted((run / "tb").glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns)


def scalars_of(file: Path, tag: str) -> dict[int, float]:
    """Values of a tag in one event file, by step."""
    reader = EventAccumulator(str(file))
    reader.Reload()
    return {event.step: event.value for event in reader.Scalars(tag)} if tag in reader.Tags()["scalars"] else {}


def scalars(run: Path, tag: str) -> dict[int, float]:
    """Values of a tag by step; what a later start wrote replaces what an earlier one did."""
    values: dict[int, float] = {}
    for file in event_files(run):
        values |= scalars_of(file, tag)
    return values


def tags(run: Path) -> set[str]:
    """All scalar tags of a run."""
    found: set[str] = set()
    for path in event_files(run):
        reader = EventAccumulator(str(path))
        reader.Reload()
        found |= set(reader.Tags()["scalars"])
    return found
