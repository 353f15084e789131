"""TensorBoard's event files on a disk that may be full: what cannot be written is dropped, and training goes on."""

import contextlib
import io
import itertools
import os
import socket
import time
from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch.utils.tensorboard import FileWriter, RecordWriter, SummaryWriter

from callbacks.telling import tell

_VERSION = "brain.Event:2"  # what every event file begins with
_numbers = itertools.count()  # of this process's event files


class EventFiles:
    """Takes events as tensorboard's EventFileWriter does, whose thread a single failed write ends for good; this one has no thread.

    Events wait in memory until they are flushed. A flush that fails is told once, and its events are dropped. As half of one may stand at
    the end of the file, which hides from readers whatever follows it there, each later flush tries a new file; the first that is written
    is told too. No method raises an OSError.

    Args:
        log_dir: folder of the files, made where it is missing.
        max_queue: number of events that may wait before adding one flushes them.
        suffix: ends the files' names.
    """

    def __init__(self, log_dir: str, max_queue: int = 10, suffix: str = "") -> None:
        self._log_dir, self._max_queue, self._suffix = Path(log_dir), max_queue, suffix
        self._path: Path | None = None  # the file under way, if any
        self._failing = False
        self._waiting: list[bytes] = []
        self._write()  # TensorBoard shows a run as soon as it has a file

    def get_logdir(self) -> str:
        """The folder of the files."""
        return str(self._log_dir)

    def add_event(self, event: Event) -> None:
        """Take one event, to be written with the next flush at the latest."""
        self._waiting.append(event.SerializeToString())
        if len(self._waiting) >= self._max_queue:
            self._write()

    def flush(self) -> None:
        """Write what waits, or drop it."""
        if self._waiting:
            self._write()

    close = flush  # no file stays open

    def _write(self) -> None:
        path, events = self._path, self._waiting
        self._waiting = []
        if path is None:
            # Readers take files in the order of their names: second, then number.
            name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers):06d}{self._suffix}"
            path, events = self._log_dir / name, [Event(wall_time=time.time(), file_version=_VERSION).SerializeToString(), *events]
        records = io.BytesIO()
        for event in events:
            RecordWriter(records).write(event)
        try:
            self._log_dir.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(records.getvalue())
        except OSError as error:
            if self._path is None:  # a new file without a whole event: there would be one for every flush
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            if not self._failing:
                reason = error.strerror or error
                tell(f"warning: cannot write TensorBoard's {path}: {reason}; make room. Training goes on, what it logs until then is lost")
            self._path, self._failing = None, True
            return
        if self._failing:
            tell(f"TensorBoard's events are written again, into {path}")
        self._path, self._failing = path, False


class _Writer(SummaryWriter):
    """torch's, into EventFiles."""

    def _get_file_writer(self) -> FileWriter:
        if self.file_writer is None:
            self.file_writer = _FileWriter(EventFiles(str(self.log_dir), self.max_queue, self.filename_suffix))
            self.all_writers = {self.file_writer.get_logdir(): self.file_writer}
            if self.purge_step is not None:  # TensorBoard forgets what an earlier start logged from this step on
                self.file_writer.add_event(Event(file_version=_VERSION), self.purge_step)
                self.file_writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), self.purge_step)
                self.purge_step = None
        return self.file_writer


class _FileWriter(FileWriter):
    """torch's, around what is handed in."""

    def __init__(self, events: EventFiles) -> None:  # not torch's, which begins a file of tensorboard's
        self.event_writer = events


class FaultTolerantTensorBoardLogger(TensorBoardLogger):
    """Lightning's TensorBoardLogger, which a disk that is full, gone or read-only does not let end the run.

    What fails is told in one line on the standard error of rank 0, and where writing succeeds again that is told as well; what was logged
    in between is lost. `flush_secs` has no meaning here: `save`, which all that logs calls, flushes.
    """

    _told = False  # of the hyperparameters' file

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """torch's SummaryWriter; on other ranks than 0 one that does nothing."""
        if self._experiment is None:
            self._experiment = _Writer(log_dir=self.log_dir, **self._kwargs)
        return self._experiment

    @rank_zero_only
    def save(self) -> None:
        """Flush, and write the module's hyperparameters beside the events where they are not there yet."""
        file = Path(self.log_dir) / self.NAME_HPARAMS_FILE
        there = file.exists()
        try:
            super().save()
        except OSError as error:
            if not there:
                with contextlib.suppress(OSError):
                    file.unlink(missing_ok=True)  # half of one would count as written
            if not self._told:  # it is tried at every step that is logged
                tell(f"warning: cannot write {file}: {error.strerror or error}. Training goes on")
            self._told = True
