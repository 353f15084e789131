"""A disk that is full, gone, read-only or over its quota: training goes on, or stops with one line; the last good checkpoint is whole."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from processes import ROOT, run_python

from callbacks import AtomicCheckpointIO, BackgroundCheckpointIO, RunCheckpoint
from mmrec.files import read_checkpoint

IOS = [AtomicCheckpointIO, BackgroundCheckpointIO]


class At(Callback):
    """Does something before the first batch after some number of steps."""

    def __init__(self, actions: dict[int, Any]) -> None:
        self.actions = dict(actions)

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if action := self.actions.pop(trainer.global_step, None):
            for job in getattr(trainer.strategy.checkpoint_io, "_jobs", []):  # not wait(), which would be told of a failure
                job.result()
            action()


def fit(
    folder: Path,
    stubs: ModuleType,
    io: type,
    actions: dict[int, Any],
    steps: int = 8,
    resume: str | None = None,
    accumulate: int = 1,
    **network: Any,
) -> None:
    """A checkpoint every second step."""
    callbacks = [At(actions), RunCheckpoint(every_n_steps=2)]
    options = {"logger": False, "max_steps": steps, "accumulate_grad_batches": accumulate, "plugins": [io()]}
    trainer = stubs.make_trainer(folder, callbacks, **options)
    trainer.fit(stubs.make_module(network), datamodule=stubs.StubData(), ckpt_path=resume)


def last_step(folder: Path) -> int:
    return read_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"]


class Disk:
    """Stands in for torch.save: with an error number set, writing fails midway, as on a disk that is full or gone."""

    def __init__(self) -> None:
        self.real, self.fault = torch.save, 0

    def __call__(self, content: Any, file: Any) -> None:
        if self.fault:
            file.write(b"half")
            raise OSError(self.fault, os.strerror(self.fault))
        self.real(content, file)

    def breaks(self, number: int) -> Any:
        return lambda: setattr(self, "fault", number)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(torch, "save", disk)
    return disk


@pytest.mark.parametrize("io", IOS)
@pytest.mark.parametrize(("number", "accumulate"), [(errno.ENOSPC, 1), (errno.EDQUOT, 1), (errno.EROFS, 1), (errno.ENOSPC, 4)])
def test_a_write_that_fails_once_is_told_and_training_goes_on(
    number: int, accumulate: int, io: type, disk: Disk, tmp_path: Path, stubs: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, stubs, io, {3: disk.breaks(number), 5: disk.breaks(0)}, accumulate=accumulate)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(told) == 1
    assert re.fullmatch(
        rf"warning: cannot write the checkpoint {tmp_path}/checkpoints/step=000004-loss=[\d.]+\.ckpt: {os.strerror(number)}; "
        r"it needs about [\d.]+ MiB and [\d,.]+ MiB are free; make room\. Training goes on \(1 of at most 3 failures in a row\)",
        told[0],
    )
    assert last_step(tmp_path) == 8
    assert sorted(path.name[:11] for path in (tmp_path / "checkpoints").iterdir()) == ["last.ckpt", "step=000006", "step=000008"]


@pytest.mark.parametrize("io", IOS)
def test_after_three_in_a_row_the_run_stops_and_the_last_good_one_is_whole(
    io: type, disk: Disk, tmp_path: Path, stubs: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(OSError, match=r"^cannot write the checkpoint .*step=000010.*: No space left .*\. What was written before"):
        fit(tmp_path, stubs, io, {5: disk.breaks(errno.ENOSPC)}, steps=100)
    # The third failure; behind the training it is seen when the fourth is due, and that one is what ends it on its way out.
    told = capsys.readouterr().err
    assert [f"({count} of at most 3 failures in a row)" in told for count in (1, 2, 3)] == [True, True, False]
    assert last_step(tmp_path) == 4
    assert sorted(path.name[:11] for path in (tmp_path / "checkpoints").iterdir()) == ["last.ckpt", "step=000002", "step=000004"]
    disk.fault = 0
    fit(tmp_path, stubs, io, {}, steps=6, resume="last")
    assert last_step(tmp_path) == 6


@pytest.mark.parametrize("io", IOS)
@pytest.mark.parametrize("steps", [6, 7])  # the last checkpoint is a regular one, or the end's own
def test_where_the_last_write_fails_the_run_does(io: type, steps: int, disk: Disk, tmp_path: Path, stubs: ModuleType) -> None:
    with pytest.raises(OSError, match=r"^cannot write the checkpoint .*: No space left on device; .* What was written before is whole"):
        fit(tmp_path, stubs, io, {5: disk.breaks(errno.ENOSPC)}, steps=steps)
    assert last_step(tmp_path) == 4


@pytest.mark.parametrize("io", IOS)
def test_a_folder_that_is_gone_is_made_anew(io: type, tmp_path: Path, stubs: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, stubs, io, {3: lambda: shutil.rmtree(tmp_path / "checkpoints")})
    assert capsys.readouterr().out.count(f"the checkpoint folder {tmp_path}/checkpoints was gone: it is made anew\n") == 1
    assert last_step(tmp_path) == 8


@pytest.mark.parametrize("io", IOS)
def test_a_folder_that_cannot_be_made_anew(io: type, tmp_path: Path, stubs: ModuleType) -> None:
    """A file lies where it was."""

    def replace() -> None:
        shutil.rmtree(tmp_path / "checkpoints")
        (tmp_path / "checkpoints").touch()

    with pytest.raises(OSError, match=r"^cannot write the checkpoint .*/checkpoints/step=.*: (File exists|Not a directory)"):
        fit(tmp_path, stubs, io, {3: replace})


@contextlib.contextmanager
def mounted(folder: Path, mebibytes: int) -> Iterator[None]:
    """A real file system of its own size in `folder`; the test is left out where mounting is not allowed."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("io", IOS)
def test_a_disk_that_really_is_full(io: type, tmp_path: Path, stubs: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Three checkpoints of some 8 MiB fit beside each other on 30, two that stay and one being written; not with another file of 8."""
    disk = tmp_path / "disk"
    network = {"model_dim": 128, "ffn_dim": 512}
    with mounted(disk, 30):
        other = disk / "other"
        fit(disk, stubs, io, {5: lambda: other.write_bytes(bytes(8 * 2**20)), 7: other.unlink}, **network)
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
        assert len(told) == 1
        assert re.search(r"no space left on the disk; it needs about 8\.\d MiB and 5\.\d MiB are free; make room", told[0])
        assert last_step(disk) == 8
        with pytest.raises(OSError, match=r"no space left on the disk; .* What was written before is whole"):
            fit(disk, stubs, io, {9: lambda: other.write_bytes(bytes(8 * 2**20))}, steps=100, resume="last", **network)
        assert last_step(disk) == 8
        assert all(read_checkpoint(path) for path in (disk / "checkpoints").iterdir())


@pytest.mark.parametrize("io", IOS)
def test_a_disk_that_really_becomes_read_only(io: type, tmp_path: Path, stubs: ModuleType) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, 8):
        remount = ["mount", "-o", "remount,ro", str(disk)]
        with pytest.raises(OSError, match=r"^cannot write the checkpoint .*: Read-only file system; .* What was written before is whole"):
            fit(disk, stubs, io, {5: lambda: subprocess.run(remount, check=True)})
        assert last_step(disk) == 4


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["background", "atomic"])
def test_two_ranks_go_on_and_stop_together(kind: str, tmp_path: Path) -> None:
    """The writes of steps 4 and, for good, from 8 on fail on rank 0, the only one that writes."""
    options = {"folder": str(tmp_path), "max_steps": 9, "devices": 2, "strategy": "ddp", "io": kind, "failing_saves": [4, 8, 9]}
    ended = run_python(ROOT / "tests" / "stub_run.py", json.dumps(options), expect=None, cwd=tmp_path)
    assert ended.returncode in (1, -signal.SIGKILL), ended.stderr  # Lightning's launcher kills rank 0 where it sees rank 1 gone before it
    lines = ended.stderr.splitlines()
    assert sum("(1 of at most 3 failures in a row)" in line for line in lines) == 2
    assert sum("OSError: cannot write the checkpoint " in line for line in lines) >= 1
    assert "timed out" not in ended.stderr.lower()
    assert last_step(tmp_path) == 6
    assert max(int(line.split()[0]) for line in (tmp_path / "steps-1.txt").read_text().splitlines()) == 9
