"""Preemption: a run that is told to stop saves first, and all its ranks stop at the same step."""

import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.run_checkpoint import RunCheckpoint
from callbacks.stop_agreement import StopAgreement
from mmrec.stop_signals import default_interrupt, keep_interrupt, keep_stop_signals, received_stop_signal, stop_signals_kept

_TOLD = "\nCtrl-C: the run saves at the end of this step and leaves; once more to leave at once\n"


class Preemption(Callback):
    """On SIGTERM, SIGUSR1 or Ctrl-C at any rank, all ranks save a checkpoint after the same optimiser step, and `fit` returns.

    The signal sets a flag (`mmrec.stop_signals`) and no more: a handler that does something does it in the midst of a collective or of
    a write. At the end of each batch the ranks exchange their flags, and read what they exchanged a batch before. The step then under way
    is finished, all its micro-batches. A validation under way is finished as well; one that is due after that very step still runs, behind
    the checkpoint, since no resumed run repeats it. A signal that comes before the first batch ends the run before that.

    Ctrl-C counts from the first step to the last, and once: a second one interrupts, and nothing is saved then.

    Lightning's own handlers broadcast within the handler, which deadlocks where one rank is signalled, or two at different moments; and
    before every batch its loop broadcasts whether a signal came and waits for the GPU to say so. Both are switched off here.

    Put it last of the callbacks: what it saves is then the state of the others at the step's end.

    Attributes:
        requeue: whether the command line is to ask Slurm for another start.
        stopped_by: the signal that ended the run, the same on all ranks; None where it ended by itself.
        started_at, stopped_at: optimiser steps taken by then, those of earlier starts included.
        saved: the checkpoint of `stopped_at` that was written; None without RunCheckpoint, and where no step was taken.
    """

    def __init__(self, requeue: bool = True) -> None:
        """Say what is to happen under Slurm.

        Args:
            requeue: put the job back into Slurm's queue when it was told to stop; `fit --ckpt_path last` in its script then goes on.
        """
        self.requeue = requeue
        self._forget()

    def _forget(self) -> None:
        self.stopped_by: signal.Signals | None = None
        self.started_at = self.stopped_at = self._step = 0
        self.saved: Path | None = None
        self._agreement: StopAgreement | None = None
        self._agreed = 0  # the signal's number

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the signals, where the command line does not do so already, and switch Lightning's ways off."""
        if stage != "fit":
            return
        self._forget()
        if not stop_signals_kept():
            keep_stop_signals()
        trainer._signal_connector.register_signal_handlers = _do_nothing
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _do_nothing

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the group; stop if a signal came while things were set up and validated for the first time."""
        self.started_at = self._step = trainer.global_step
        keep_interrupt(_TOLD if trainer.is_global_zero else "")
        self._agreement = StopAgreement(getattr(trainer.strategy, "_timeout", None))  # as patient as the strategy
        self._agreed = self._agreement.now(received_stop_signal())
        if self._agreed:
            self._stop(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Exchange the flags; at the end of a step, save and stop where a signal was agreed on."""
        if self._agreement is None:
            return
        if not self._agreed:
            self._agreed = self._agreement.since_last(received_stop_signal())
        step, self._step = self._step, trainer.global_step
        finished = 0 <= trainer.max_steps <= trainer.global_step  # then it ends by itself
        # Gradients are in no checkpoint, so it has to be of the end of a step.
        if not self._agreed or trainer.global_step == step or finished:
            return
        loop = trainer.fit_loop.epoch_loop
        # Else Lightning would validate because it stops.
        loop._skip_next_val = not loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
        self._stop(trainer)
        self.saved = _save(trainer, pl_module)

    def _stop(self, trainer: Trainer) -> None:
        self.stopped_by, self.stopped_at = signal.Signals(self._agreed), trainer.global_step
        trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = 0, None  # they would have it train on
        trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the exchange that is under way."""
        default_interrupt()
        if self._agreement is not None:
            self._agreement.finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave Ctrl-C as it was."""
        default_interrupt()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """After the strategy's teardown, which completes what is being written: a run that was stopped waits for all its ranks here."""
        if self._agreement is not None and self.stopped_by is not None:
            self._agreement.wait_for_all()
        self._agreement = None


def _do_nothing() -> None:
    """In the place of Lightning's."""


def _save(trainer: Trainer, pl_module: LightningModule) -> Path | None:
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, RunCheckpoint) and not trainer.fast_dev_run:
            callback.save_step(trainer, pl_module)
            return Path(callback.last_model_path)
    return None
