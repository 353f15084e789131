"""How `fit` leaves when a signal ended it: one line, Slurm's queue, an exit code that a scheduler understands."""

import signal
import subprocess
import sys

from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from callbacks import Preemption
from callbacks.launched_ranks import launched_ranks
from mmrec.commandline.slurm import RequeueError, requeue, slurm_job
from mmrec.stop_signals import default_stop_signals

STOPPED = 143  # exit code: 128 + SIGTERM, for either of a scheduler's signals; the run is saved and not finished
INTERRUPTED = 130  # exit code: 128 + SIGINT; saved as well
NOT_REQUEUED = 1  # exit code
_PATIENCE = 60  # seconds for processes that have nothing left to do


def leave_signals_to_children(trainer: Trainer) -> None:
    """Where this process trains nothing itself but forks those that do, let signals end it, as they would end any other program."""
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        default_stop_signals()


def leave_if_stopped(trainer: Trainer, preemption: Preemption) -> None:
    """Return where the run ended by itself. Else say where it can go on, ask Slurm for another start, and leave.

    Exit codes: 143 where the run is saved and nobody was asked to start it again, 130 after a Ctrl-C, which asks nobody; 0 where Slurm was
    asked; 1 where it refused. One process tells it for all those that it started itself, and rank 0 for all those that Slurm requeues; the
    others' code is 0, since a launcher takes any other for a failure and kills the rest.
    """
    if preemption.stopped_by is None:
        return
    interrupted = preemption.stopped_by == signal.SIGINT
    job = slurm_job() if preemption.requeue and not interrupted else None
    launched = isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment) and trainer.local_rank > 0
    if launched or (job is not None and not trainer.is_global_zero):
        raise SystemExit(0)
    if trainer.is_global_zero:
        print(_line(preemption), flush=True)
    _wait_for_children(trainer)
    raise SystemExit(INTERRUPTED if interrupted else STOPPED if job is None else _requeue(job))


def _line(preemption: Preemption) -> str:
    assert preemption.stopped_by is not None
    stopped = f"stopped by {preemption.stopped_by.name} at step {preemption.stopped_at}"
    if preemption.saved is not None:
        return f"{stopped}, saved to {preemption.saved}; --ckpt_path last goes on"
    if preemption.stopped_at == preemption.started_at:
        return f"{stopped}, before a step was taken: there is nothing to save"
    return f"{stopped}, not saved: trainer.enable_checkpointing is false"


def _wait_for_children(trainer: Trainer) -> None:
    """Be the last to leave: a container ends with its first process."""
    for process in launched_ranks(trainer):
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            print(f"process {process.pid} has not ended within {_PATIENCE} s", file=sys.stderr, flush=True)


def _requeue(job: str) -> int:
    """The exit code."""
    try:
        answer = requeue(job)
    except RequeueError as error:
        remedy = "submit it again, or give --preemption.requeue false where it is no batch job"
        print(f"error: Slurm did not put job {job} back into its queue: {error}; {remedy}", file=sys.stderr, flush=True)
        return NOT_REQUEUED
    if answer.state is not None:
        print(f"job {answer.job} is {answer.state}: not put back into Slurm's queue", flush=True)
        return STOPPED
    print(f"job {answer.job} is back in Slurm's queue", flush=True)
    return 0
