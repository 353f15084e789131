"""Slurm: whether this process is part of a job, and how the job gets another start."""

import os
import subprocess

_RUNNING = "RUNNING"
_PATIENCE = 60  # seconds; a busy controller may take some


class RequeueError(RuntimeError):
    """Slurm did not put the job back; the message is one line that says what it said."""


def slurm_job() -> str | None:
    """The number of the Slurm job that this process is part of; None elsewhere."""
    return os.environ.get("SLURM_JOB_ID") or None


def requeue(job: str) -> str | None:
    """Put a running job back into the queue; Slurm then ends this start of it.

    A job that is being ended is left alone: who cancelled it wants it gone, and one that Slurm itself preempts it puts back by itself.

    Returns:
        None where it was put back, else the state for which it was not.

    Raises:
        RequeueError: Slurm refused, or cannot be asked.
    """
    state = _run("squeue", "--noheader", "--jobs", job, "--format", "%T")
    if state != _RUNNING:
        return state or "gone"
    _run("scontrol", "requeue", job)
    return None


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RequeueError(f"{' '.join(command)}: {error}") from error
    if done.returncode != 0:
        raise RequeueError(f"{' '.join(command)}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout.strip()
