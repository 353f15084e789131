"""TensorBoard on a disk that is full, gone or full from the start: told in a line, training goes on, and logging resumes with the room."""

import contextlib
import errno
import io
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from processes import ROOT, run_python
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from test_failing_writes import At, mounted

from callbacks import AuxiliaryLossCurves, FaultTolerantTensorBoardLogger, GPUMemoryProfile
from callbacks.tensorboard_logger import EventFiles

FULL = os.strerror(errno.ENOSPC)


class Half:
    """A file that takes half of what is written."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> "Half":
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        self.file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, FULL)


class FullDisk:
    """Stands in for Path.open: while it is full, event files take half of what is written and no more."""

    def __init__(self) -> None:
        self.real, self.full, self.refused = Path.open, False, 0

    def __call__(self, path: Path, *args: Any, **options: Any) -> Any:
        file = self.real(path, *args, **options)
        if not self.full or not path.name.startswith("events.out."):
            return file
        self.refused += 1
        return Half(file)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    disk = FullDisk()
    monkeypatch.setattr(Path, "open", lambda path, *args, **options: disk(path, *args, **options))
    return disk


def fit(folder: Path, stubs: ModuleType, actions: dict[int, Any]) -> None:
    """Twelve steps with what writes texts, histograms and a layout."""
    callbacks = [AuxiliaryLossCurves(histograms=True, diagnostics_every_n_steps=1), GPUMemoryProfile(), At(actions)]
    trainer = stubs.make_trainer(folder, callbacks, max_steps=12)
    trainer.fit(stubs.make_module({"use_uboo": True}), datamodule=stubs.StubData())
    assert trainer.global_step == 12


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return [line for line in err.splitlines() if "TensorBoard" in line]


def steps(path: Path, tag: str = "train/loss") -> list[int]:
    """The steps of a tag, as TensorBoard reads one file or a folder's."""
    reader = EventAccumulator(str(path))
    reader.Reload()
    return [event.step for event in reader.Scalars(tag)] if tag in reader.Tags()["scalars"] else []


def event_files(folder: Path) -> list[Path]:
    return sorted((folder / "tb").glob("events.out.tfevents.*"))


def check_two_files(folder: Path, lines: list[str]) -> None:
    """What was logged before step 5 and from step 8 on is there, in a file each, and both changes were told once."""
    first, second = event_files(folder)
    assert lines == [
        f"warning: cannot write TensorBoard's {first}: {FULL}; make room. Training goes on, what it logs until then is lost",
        f"TensorBoard's events are written again, into {second}",
    ]
    assert set(steps(first)) >= set(range(5))
    assert max(steps(first)) < 8  # the last block of a full disk's file has room yet
    assert steps(second) == [8, 9, 10, 11]
    assert set(steps(folder / "tb")) >= {0, 1, 2, 3, 4, 8, 9, 10, 11}
    assert steps(second, "val/loss") == [9, 12]
    reader = EventAccumulator(str(second))
    reader.Reload()
    assert reader.Tags()["histograms"]


def test_a_full_disk_does_not_end_the_run(disk: FullDisk, tmp_path: Path, stubs: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, stubs, {5: lambda: setattr(disk, "full", True), 8: lambda: setattr(disk, "full", False)})
    assert disk.refused > 3
    assert not {6, 7} & set(steps(event_files(tmp_path)[0]))
    check_two_files(tmp_path, told(capsys))


def test_a_disk_that_really_is_full(tmp_path: Path, stubs: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "disk"
    with mounted(folder, 4):

        def fill() -> None:
            with contextlib.suppress(OSError), (folder / "other").open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass

        fit(folder, stubs, {5: fill, 8: (folder / "other").unlink})
        check_two_files(folder, told(capsys))


def test_a_disk_that_stays_full_to_the_end(disk: FullDisk, tmp_path: Path, stubs: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, stubs, {5: lambda: setattr(disk, "full", True)})
    (file,) = event_files(tmp_path)  # none for each try
    assert len(told(capsys)) == 1
    assert steps(file) in ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5])


def test_a_folder_that_is_gone_for_a_while(tmp_path: Path, stubs: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """A file lies where it was; then the folder is made anew, with the hyperparameters that lay in it."""

    def replace() -> None:
        shutil.rmtree(tmp_path / "tb")
        (tmp_path / "tb").touch()

    fit(tmp_path, stubs, {5: replace, 8: (tmp_path / "tb").unlink})
    lines = told(capsys)
    assert len(lines) == 2
    assert os.strerror(errno.EEXIST) in lines[0]
    (file,) = event_files(tmp_path)
    assert lines[1].endswith(f"into {file}")
    assert steps(file) == [8, 9, 10, 11]
    assert (tmp_path / "tb" / "hparams.yaml").is_file()


def test_hyperparameters_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: str, *_: Any) -> None:
        Path(file).write_text("half")
        raise OSError(errno.ENOSPC, FULL)

    monkeypatch.setattr("lightning.pytorch.loggers.tensorboard.save_hparams_to_yaml", full)
    logger = FaultTolerantTensorBoardLogger(tmp_path, name="tb", version="", default_hp_metric=False)
    logger.log_metrics({"loss": 1.0}, step=3)
    logger.save()
    logger.save()
    assert capsys.readouterr().err == f"warning: cannot write {tmp_path}/tb/hparams.yaml: {FULL}. Training goes on\n"
    assert not (tmp_path / "tb" / "hparams.yaml").exists()
    assert steps(tmp_path / "tb", "loss") == [3]


def test_a_standard_error_on_the_same_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tb").touch()
    with io.TextIOWrapper(io.FileIO("/dev/full", "w"), write_through=True) as full:
        with pytest.raises(OSError, match=FULL):
            print("anything", file=full, flush=True)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", full)
            files = EventFiles(str(tmp_path / "tb"))
            files.add_event(Event(step=1))
            files.flush()
            files.close()


def test_a_logger_that_was_finalized_begins_a_new_file(tmp_path: Path) -> None:
    """A second `fit` of the same Trainer."""
    logger = FaultTolerantTensorBoardLogger(tmp_path, name="tb", version="", default_hp_metric=False)
    for step in (0, 1):
        logger.log_metrics({"loss": 1.0}, step=step)
        logger.finalize("success")
    assert [steps(path, "loss") for path in event_files(tmp_path)] == [[0], [1]]


def test_what_an_earlier_start_logged_later_than_its_checkpoint_is_forgotten(tmp_path: Path) -> None:
    for first, purge in ((0, None), (3, 3)):
        logger = FaultTolerantTensorBoardLogger(tmp_path, name="tb", version="", default_hp_metric=False, purge_step=purge)
        for step in range(first, 5):
            logger.log_metrics({"loss": float(first)}, step=step)
        logger.finalize("success")
    reader = EventAccumulator(str(tmp_path / "tb"))
    reader.Reload()
    assert [(event.step, event.value) for event in reader.Scalars("loss")] == [(0, 0), (1, 0), (2, 0), (3, 3), (4, 3)]


@pytest.fixture
def both(tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    theirs, ours = EventFileWriter(str(tmp_path / "theirs")), EventFiles(str(tmp_path / "ours"))
    yield theirs, ours
    theirs.close()
    ours.close()


def test_the_file_is_tensorboards_to_the_byte(both: tuple[Any, Any], tmp_path: Path) -> None:
    """But for the first event, which holds the time."""
    for writer in both:
        writer.add_event(Event(step=7, session_log=SessionLog(status=SessionLog.START)))
        writer.flush()
    (theirs,), (ours,) = ((tmp_path / name).iterdir() for name in ("theirs", "ours"))
    record = len(Event(step=7, session_log=SessionLog(status=SessionLog.START)).SerializeToString()) + 16
    assert theirs.read_bytes()[-record:] == ours.read_bytes()[-record:]
    assert theirs.name.split(".")[:3] == ours.name.split(".")[:3]
    assert f".{socket.gethostname()}.{os.getpid()}." in ours.name


def test_events_are_flushed_when_ten_wait(tmp_path: Path) -> None:
    files = EventFiles(str(tmp_path))
    (path,) = tmp_path.iterdir()
    empty = path.stat().st_size
    for step in range(9):
        files.add_event(Event(step=step))
    assert path.stat().st_size == empty
    files.add_event(Event(step=9))
    assert path.stat().st_size > empty


@pytest.mark.faults
def test_two_ranks_train_on(tmp_path: Path) -> None:
    """TensorBoard's folder cannot be made at all."""
    (tmp_path / "tb").touch()
    options = {"folder": str(tmp_path), "max_steps": 6, "devices": 2, "strategy": "ddp"}
    ended = run_python(ROOT / "tests" / "stub_run.py", json.dumps(options), cwd=tmp_path)
    assert ended.stderr.count("cannot write TensorBoard's") == 1
    assert [len((tmp_path / f"steps-{rank}.txt").read_text().splitlines()) for rank in (0, 1)] == [6, 6]
