"""Data workers are no forks of the run, live through a scheduler's signals, and are gone in the end, whatever they are doing."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stuck_worker import Stuck

from datamodules.loader import ResumableDataLoader
from datamodules.recall_tasks import AssociativeRecall, RecallExamples
from datamodules.tokens import TokenWindows
from datamodules.windows import EndlessBatches
from datamodules.workers import NEEDED
from mmrec.stop_signals import STOP_SIGNALS

ROOT = Path(__file__).parents[2]
DEADLINE = 120.0  # seconds; the machine may be busy


def _loader() -> ResumableDataLoader:
    source = RecallExamples([AssociativeRecall(24, 16, 4).example], 0, 0, 100)
    batches = EndlessBatches(source, 2, rank=0, world_size=1, seed=0, shuffle=True)
    return ResumableDataLoader(batches, num_workers=2, rank=0, world_size=1, identity={})


def _parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def _gone(process: int) -> bool:
    """Within the deadline; one whose parent has not asked for its exit code is gone too."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.05)
    return False


def test_every_process_but_the_run_lives_through_the_signals_of_a_scheduler() -> None:
    def batches(number: int) -> list[dict[str, torch.Tensor]]:
        iterator: Any = iter(_loader())
        found = [next(iterator)]
        server, tracker = forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid  # type: ignore[attr-defined]
        workers = [worker.pid for worker in iterator._workers]
        assert [_parent(worker) for worker in workers] == [server, server]
        for process in (*workers, server, tracker) if number else ():
            os.kill(process, number)
        found += [next(iterator) for _ in range(8)]  # more than were fetched ahead
        assert (server, tracker) == (forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid)  # type: ignore[attr-defined]
        assert all(_parent(process) for process in (*workers, server, tracker))
        return found

    expected = batches(0)
    for number in STOP_SIGNALS:
        for ours, theirs in zip(batches(number), expected, strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_run_takes_signals_as_before() -> None:
    _loader()
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOP_SIGNALS)


@pytest.mark.parametrize("how", ["dropped", "exit", "killed"])
def test_a_stuck_worker_is_gone_when_the_run_is(how: str) -> None:
    """With the iterator, when Python leaves, and when the run is killed, as by kill -9."""
    command = [sys.executable, str(Path(__file__).with_name("stuck_worker.py")), how]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert run.stdout is not None
        processes = [int(number) for number in run.stdout.readline().split()]
        assert len(processes) == 2
        if how == "killed":
            run.kill()
        assert run.wait(DEADLINE) == (-signal.SIGKILL if how == "killed" else 0)
        assert all(_gone(process) for process in processes)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)


def test_a_worker_that_is_killed_ends_the_run() -> None:
    iterator: Any = iter(ResumableDataLoader(Stuck(), num_workers=1, rank=0, world_size=1, identity={}))
    next(iterator)
    iterator._workers[0].kill()
    with pytest.raises(RuntimeError, match=r"DataLoader worker .* exited unexpectedly"):
        next(iterator)


def test_what_workers_import_is_without_lightning() -> None:
    """It would take seconds."""
    modules = [*NEEDED, "datamodules.workers", "datamodules.windows", "datamodules.tokens", "datamodules.recall_tasks", "mmrec.cli"]
    program = f"import sys, {', '.join(modules)}\nassert not {{'lightning', 'datasets'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_tokens_are_sent_to_a_worker(tokens_dir: Path) -> None:
    source = TokenWindows(tokens_dir, "train", 8)
    everything = source.batch(np.arange(source.num_windows))
    sent = pickle.dumps(EndlessBatches(source, 2, rank=0, world_size=1, seed=0, shuffle=True))
    assert len(sent) < 10_000 < everything["input_ids"].size
    assert np.array_equal(pickle.loads(sent).source.batch(np.arange(3))["input_ids"], everything["input_ids"][:3])
