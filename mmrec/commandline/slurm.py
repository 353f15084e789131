"""Slurm: whether this process is part of a job, and how the job gets another start."""

import os
import subprocess
from typing import NamedTuple

_RUNNING = "RUNNING"
_PATIENCE = 60  # seconds; a busy controller may take some


class RequeueError(RuntimeError):
    """Slurm did not put the job back; the message is one line that says what it said."""


class Answer(NamedTuple):
    """What became of a job that was to be put back into the queue.

    Attributes:
        job: what Slurm's programs call it: its number, or that of its array and its own in there, as 7_2.
        state: None where it was put back, else the state for which it was not.
    """

    job: str
    state: str | None


def slurm_job() -> str | None:
    """The number of the Slurm job that this process is part of; None elsewhere."""
    return os.environ.get("SLURM_JOB_ID") or None


def requeue(job: str) -> Answer:
    """Put a running job back into the queue; Slurm then ends this start of it.

    A job that is being ended is left alone: who cancelled it wants it gone, and one that Slurm itself preempts it puts back by itself.

    Args:
        job: the job's number, as `slurm_job` returns it.

    Raises:
        RequeueError: Slurm refused, or cannot be asked.
    """
    name, state = _in_queue(job)
    if state != _RUNNING:
        return Answer(name, state or "gone")
    _run("scontrol", "requeue", name)
    return Answer(name, None)


def _in_queue(job: str) -> tuple[str, str]:
    """What Slurm's programs call a job, and its state: "" where they do not know it.

    One task of an array has the array's number as its own, by which they mean all tasks; by its place in the array they mean it alone.
    Asked for here and not taken from SLURM_ARRAY_TASK_ID, which sbatch hands on to jobs that a task submits.
    """
    for line in _run("squeue", "--noheader", "--jobs", job, "--format", "%A %F %K %T").splitlines():
        number, array, index, state = line.split()
        if number == job:
            return (f"{array}_{index}" if index.isdecimal() else job), state
    return job, ""


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RequeueError(f"{' '.join(command)}: {error}") from error
    if done.returncode != 0:
        raise RequeueError(f"{' '.join(command)}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout.strip()
