"""RankWatch: of ranks that train together none goes on alone; the one that failed is named."""

import atexit
import math
import os
import subprocess
import threading
import time
from datetime import timedelta
from functools import partial
from typing import Any

from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import distributed as dist

from callbacks.background_checkpoint_io import BackgroundCheckpointIO
from callbacks.launched_ranks import launched_ranks
from callbacks.rank_monitor import RankMonitor

# Ways to end that are no failure of one rank: all ranks take them together, each with its own exit code.
_ORDERLY = (KeyboardInterrupt, SystemExit, SIGTERMException)
# What a collective says on a rank whose peer has gone.
_OF_PEERS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "timed out", "broken pipe")
_WRITE_SECONDS = 20.0  # given to a checkpoint under way before the process ends: with the time to find a dead rank, less than a minute
_CHILD_SECONDS = 10.0  # given to the ranks that this process has started to end by themselves, with what they have to say
_LONGEST = 1000  # characters of an error that all ranks repeat


class RankWatch(Callback):
    """Runs a RankMonitor beside a `fit` of several ranks.

    A rank that raises says so first, and the others end a moment later with its error as the cause. A rank that was killed, or whose
    machine is gone, is found by its missing beats; a checkpoint that another is writing then has 20 s to be finished. Where nothing new has
    happened for `hang_after_seconds` on a rank (no batch of training or validation, no checkpoint), all print their stacks and end: keep it
    below the strategy's own timeout (10 minutes with ours, 30 with Lightning's unless told otherwise), which would end the ranks without
    anyone's stacks, and above the longest that a compilation or a checkpoint takes. All end with exit code 1 but the one whose error it
    was. A process that has started others on its machine, as Lightning's launcher does, gives them 10 s and kills those that are left,
    stopped ones among them. It does nothing where one process trains.
    """

    def __init__(self, interval_seconds: float = 2.0, dead_after_seconds: float = 30.0, hang_after_seconds: float = 540.0) -> None:
        """Watch.

        Args:
            interval_seconds: between two signs of life.
            dead_after_seconds: without a sign of life after which a rank counts as dead.
            hang_after_seconds: without progress after which a rank counts as hanging; 0: never.

        Raises:
            ValueError: one of the three is negative, zero where it must not be, or not finite, or `dead_after_seconds` is less than three
                intervals.
        """
        if not 0 < interval_seconds < math.inf:
            raise ValueError(f"rank_watch.interval_seconds is {interval_seconds}; give a number above 0")
        if not 3 * interval_seconds <= dead_after_seconds < math.inf:
            least = 3 * interval_seconds
            raise ValueError(f"rank_watch.dead_after_seconds is {dead_after_seconds}; give at least three intervals, {least:g}")
        if not 0 <= hang_after_seconds < math.inf:
            raise ValueError(f"rank_watch.hang_after_seconds is {hang_after_seconds}; give seconds, or 0 for never")
        self.interval_seconds, self.dead_after_seconds, self.hang_after_seconds = interval_seconds, dead_after_seconds, hang_after_seconds
        self._monitor: RankMonitor | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin as soon as the ranks know each other."""
        if stage != "fit" or trainer.world_size == 1 or self._monitor is not None or not dist.is_initialized():
            return
        try:
            # The same store that the ranks met at, by a connection of its own.
            store = dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=self.dead_after_seconds),
            )
        except (KeyError, RuntimeError) as error:
            rank_zero_warn(f"no watch over the ranks: their store cannot be reached ({error})")
            return
        self._monitor = RankMonitor(
            store,
            trainer.global_rank,
            trainer.world_size,
            interval=self.interval_seconds,
            dead_after=self.dead_after_seconds,
            hang_after=self.hang_after_seconds,
            leave=partial(_leave, trainer),
            on_verdict=_end_observing,
        )
        self._monitor.start()

    def _progress(self, what: str) -> None:
        if self._monitor is not None:
            self._monitor.progress(what)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A sign of progress: setting up is over."""
        self._progress("the start of training")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A sign of progress: the data have come."""
        self._progress(f"the start of a batch of step {trainer.global_step}")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """A sign of progress: the gradients are there, in DDP those of all ranks."""
        self._progress(f"the gradients of step {trainer.global_step}")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A sign of progress: the batch is done."""
        self._progress(f"the end of a batch before step {trainer.global_step}")

    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """A sign of progress within a validation."""
        self._progress(f"a validation batch at step {trainer.global_step}")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A sign of progress: the state has been gathered, and the writing begins."""
        self._progress(f"the making of the checkpoint of step {trainer.global_step}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go when all ranks are here."""
        if self._monitor is not None:
            trainer.strategy.barrier("RankWatch")
            self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say what ended this rank, unless it ended as all do or since another one had."""
        if self._monitor is None:
            return
        if isinstance(exception, _ORDERLY):
            self._stop()
            return
        if _is_of_peers(exception):
            self._monitor.wait_for_others()
        atexit.register(_end_children, launched_ranks(trainer), _CHILD_SECONDS)  # after the traceback
        self._monitor.fail(f"{type(exception).__name__}: {' '.join(str(exception).split())}"[:_LONGEST])

    def _stop(self) -> None:
        if self._monitor is not None:
            self._monitor.stop()
            self._monitor = None


def _leave(trainer: Trainer, code: int) -> None:
    """End the process, after the checkpoint that a thread may be writing, and its children."""
    try:
        children, end = launched_ranks(trainer), time.monotonic() + _CHILD_SECONDS
        io = trainer.strategy.checkpoint_io
        if isinstance(io, BackgroundCheckpointIO):
            io.linger(_WRITE_SECONDS)
        _end_children(children, end - time.monotonic())
    finally:
        os._exit(code)


def _end_observing() -> None:
    """Let Lightning's observer go: it would kill this process as soon as a child has ended, in the midst of its last words and writes."""
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            thread._child_processes = []


def _end_children(children: list[subprocess.Popen[bytes]], seconds: float) -> None:
    """Wait so long for the processes to end, and kill what is left."""
    end = time.monotonic() + seconds
    for process in children:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def _is_of_peers(exception: BaseException) -> bool:
    text = str(exception).lower()
    return isinstance(exception, dist.DistError) or (isinstance(exception, RuntimeError) and any(words in text for words in _OF_PEERS))
