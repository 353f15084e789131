"""BackgroundCheckpointIO: training goes on while a checkpoint is written."""

import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from callbacks.atomic_checkpoint_io import AtomicCheckpointIO
from callbacks.host_copy import HostCopy
from callbacks.telling import tell


class BackgroundCheckpointIO(AtomicCheckpointIO):
    """Copies the state to host memory, and leaves the writing, flushing and renaming to a thread of its own.

    The copy is launched by the thread that trains, on its current stream, before any kernel of the next step: it holds what the last one
    left, and the state may be changed as soon as `save_checkpoint` returns. It lies in page-locked memory that is kept for the next
    checkpoint; host memory must hold the whole state once. Where it cannot, checkpoints are written at once, with a warning. One write is
    under way at a time: the next `save_checkpoint` waits for it. What a write raises, `wait` or the next `save_checkpoint` raises, and
    `teardown` at the latest. The interpreter does not end before the write has; a kill leaves what was there before.

    Not Lightning's AsyncCheckpointIO: it clones the state where it lies, which needs a GPU's memory twice and undoes the sharing of tied
    weights; its queue has no bound; and it cannot say when a file is there, before which no link to it can be made and nothing older be
    deleted.
    """

    def __init__(self) -> None:
        self._host = HostCopy()
        self._thread: ThreadPoolExecutor | None = None
        self._jobs: list[Future[None]] = []
        self._error: BaseException | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Copy `checkpoint` and have it written to `path`.

        Raises:
            OSError: the write before this one has failed, see `AtomicCheckpointIO`; nothing is begun then.
        """
        self.wait()
        try:
            copied, ready = self._host.take(checkpoint)
        except (OSError, RuntimeError, MemoryError) as error:  # of mmap, of torch's allocators, of Python's
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            rank_zero_warn(f"host memory cannot hold a checkpoint ({reason}): it is written at once; set checkpoint_async=false")
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        self._submit(partial(self._write, copied, ready, path, storage_options))

    def then(self, action: Callable[[], None]) -> None:
        """Do something as soon as the file of the latest `save_checkpoint` is there; never, if it could not be written."""
        self._submit(action)

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            OSError: the write has failed; said once.
        """
        for job in self._jobs:
            job.result()
        self._jobs = []
        error, self._error = self._error, None
        if error is not None:
            raise error

    def linger(self, seconds: float) -> None:
        """Wait so long at most; raises nothing. For a thread that is about to end the process."""
        wait(list(self._jobs), seconds)

    def teardown(self) -> None:
        """Wait, and give thread and memory back. A failed write not told of yet is raised, or printed behind an error under way."""
        another = sys.exc_info()[1] is not None
        try:
            self.wait()
        except OSError as error:
            if not another:
                raise
            tell(f"error: {error}")
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            self._thread = None
            self._host.close()

    def _write(self, copied: dict[str, Any], ready: Callable[[], None], path: Any, storage_options: Any) -> None:
        ready()
        super().save_checkpoint(copied, path, storage_options)

    def _submit(self, job: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._jobs.append(self._thread.submit(self._run, job))

    def _run(self, job: Callable[[], None]) -> None:
        if self._error is not None:  # what was to follow a file that is not there
            return
        try:
            job()
        except BaseException as error:
            self._error = error
