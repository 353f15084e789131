"""Processes that make batches beside a run: how they are started, and how they end.

A fork of the run itself copies locks that its threads (of torch.distributed, of NCCL, of CUDA) may hold just then; a child that needs one
waits for it without end. So workers are forks of a server, Python's `forkserver`: a process without such threads, started afresh, that has
imported what workers need. What they are to read goes to them pickled, so a dataset names its files and opens them in the worker.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import forkserver, popen_forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess

from mmrec.stop_signals import STOP_SIGNALS

# What a worker needs; imported once, by the server.
NEEDED = ["torchdata.stateful_dataloader.worker", "datamodules.packing"]


class _Popen(popen_forkserver.Popen):
    def terminate(self) -> None:
        """End the worker by a signal that it cannot but obey: SIGTERM is blocked there.

        The loader's iterator calls this for a worker that does not leave when it is told to, and Python at its own exit for every worker.
        """
        self.kill()


class _Process(ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: BaseProcess) -> _Popen:
        return _Popen(process_obj)


class _Context(ForkServerContext):
    Process = _Process  # type: ignore[assignment]


def worker_context() -> ForkServerContext:
    """The `multiprocessing_context` of every loader with workers; it starts the server, unless that is running.

    A scheduler sends the signals by which it ends a job to every process of it, as a terminal does a Ctrl-C, and the run has a step to
    finish. So they are blocked in the server and whatever comes of it; a worker ends when it is told to, when the run does
    (`end_with_run`), or by SIGKILL.
    """
    forkserver.set_forkserver_preload(NEEDED)
    with _blocked_stop_signals():
        resource_tracker.ensure_running()  # unblocks SIGTERM at its end
    with _blocked_stop_signals():
        forkserver.ensure_running()
    return _Context()


def end_with_run(worker: int) -> None:
    """`worker_init_fn`: the worker ends with the run, whatever it is doing then and however the run ended.

    torch looks for another parent process, but the parent is the server, which ends behind its workers.
    """
    run = multiprocessing.parent_process()
    if run is not None:
        threading.Thread(target=_end_with, args=(run,), daemon=True).start()


def _end_with(run: BaseProcess) -> None:
    run.join()
    os._exit(1)


@contextlib.contextmanager
def _blocked_stop_signals() -> Iterator[None]:
    """Processes that are started here inherit the mask. A signal that comes meanwhile is delivered at the end, or to another thread."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP_SIGNALS, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _forget_server() -> None:
    """In a fork of the run, which needs a server of its own: Python would wait for its parent's as for a child, and fail."""
    if forkserver._forkserver._forkserver_alive_fd is not None:
        os.close(forkserver._forkserver._forkserver_alive_fd)
    forkserver._forkserver.__init__()  # type: ignore[misc]


os.register_at_fork(after_in_child=_forget_server)
