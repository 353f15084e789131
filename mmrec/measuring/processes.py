"""A map over items in fresh processes that survives what one of them does: an error, a crash, a hang, a broken CUDA context."""

import multiprocessing
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from typing import Any

from mmrec.measuring.failures import Failure, guarded


def _child(function: Callable[[Any], Any], worker: int, initialize: Callable[[int], None] | None, connection: Connection) -> None:
    if initialize is not None:
        initialize(worker)
    while True:
        try:
            item = connection.recv()
        except EOFError:  # nothing is left to do
            return
        connection.send(guarded(function, item))


def _broken(result: Any) -> bool:
    """Whether a process is of no use after this: after an illegal access every later CUDA call of it fails."""
    return isinstance(result, Failure) and ("CUDA error" in result.reason or "AcceleratorError" in result.reason)


class _Worker:
    """A process that is started when there is an item for it, and anew when it has died."""

    def __init__(self, function: Callable[[Any], Any], index: int, initialize: Callable[[int], None] | None, seconds: float) -> None:
        self._function, self._index, self._initialize, self._seconds = function, index, initialize, seconds
        self._process: Any = None
        self._connection: Any = None

    def run(self, item: Any) -> Any:
        """The item's result; a Failure where its process died or took too long."""
        if self._process is None or not self._process.is_alive():
            self._start()
        try:
            self._connection.send(item)
            if not self._connection.poll(self._seconds):
                self.stop()
                return Failure(f"no answer within {self._seconds:.0f} s")
            result = self._connection.recv()
            if _broken(result):
                self.stop()
            return result
        except (EOFError, ConnectionError):
            self._process.join(10)
            code = self._process.exitcode
            self.stop()
            return Failure(f"its process died (exit code {code})")

    def _start(self) -> None:
        self.stop()
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._connection, theirs = context.Pipe()
        arguments = (self._function, self._index, self._initialize, theirs)
        self._process = context.Process(target=_child, args=arguments, daemon=True)
        self._process.start()
        theirs.close()  # so that the child's end is the only one, and its death an end of file

    def kill(self) -> None:
        """End the process from another thread than the one that waits for it, which then sees it end."""
        if self._process is not None:
            self._process.kill()

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
            self._process = None


def map_in_processes(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    workers: int,
    seconds: float,
    *,
    initialize: Callable[[int], None] | None = None,
    on_result: Callable[[Any, Any], None] | None = None,
) -> list[Any]:
    """`[function(item) for item in items]`, with a Failure in the place of what raised, crashed or hung.

    Args:
        function: defined at the top of a module, so that a fresh interpreter can import it.
        items: a worker takes the next one when it is done with one.
        workers: how many processes; 0 runs everything in this one.
        seconds: the longest an item may take, the start of its process included.
        initialize: called in every process before its first item, with the worker's number.
        on_result: called in this process with an item and its result as soon as there is one, one call at a time. What it raises, and an
            interrupt, ends everything.
    """
    results: list[Any] = [None] * len(items)
    waiting = iter(enumerate(items))
    lock, stopping = threading.Lock(), threading.Event()

    def finish(index: int, item: Any, result: Any) -> None:
        results[index] = result
        if on_result is not None:
            on_result(item, result)

    if workers == 0:
        for index, item in waiting:
            finish(index, item, guarded(function, item))
        return results

    def work(worker: _Worker) -> None:
        try:
            while True:
                with lock:
                    index, item = (-1, None) if stopping.is_set() else next(waiting, (-1, None))
                if index < 0:
                    return
                result = worker.run(item)
                with lock:
                    if not stopping.is_set():
                        finish(index, item, result)
        except BaseException:
            stopping.set()
            raise
        finally:
            worker.stop()

    crew = [_Worker(function, number, initialize, seconds) for number in range(min(workers, len(items)))]
    if crew:
        with ThreadPoolExecutor(len(crew)) as threads:
            shifts = [threads.submit(work, worker) for worker in crew]
            try:
                for shift in as_completed(shifts):
                    shift.result()
            except BaseException:
                stopping.set()
                for worker in crew:
                    worker.kill()
                raise
    return results
