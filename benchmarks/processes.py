"""A map over items in fresh processes that survives what one of them does: an error, a crash, a hang, a broken CUDA context."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from mmrec.measuring.failures import Failure, guarded


def _child(function: Callable[[Any], Any], items: Sequence[Any], connection: Connection) -> None:
    for item in items:
        result = guarded(function, item)
        connection.send(result)
        if isinstance(result, Failure) and ("CUDA error" in result.reason or "AcceleratorError" in result.reason):
            return  # after an illegal access every later call of this process fails: the parent starts another one


def _supervise(function: Callable[[Any], Any], items: Sequence[Any], seconds: float) -> list[Any]:
    """Results in the order of the items; an item that kills its process, or takes longer than `seconds`, becomes a Failure."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    results: list[Any] = []
    while len(results) < len(items):
        before = len(results)
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(function, items[before:], sender), daemon=True)
        process.start()
        sender.close()  # so that the child's end is the only one, and its death an end of file
        try:
            while len(results) < len(items):
                if not receiver.poll(seconds):
                    results.append(Failure(f"no answer within {seconds:.0f} s"))
                    break
                results.append(receiver.recv())
        except EOFError:
            if process.is_alive():
                process.join(10)
            if process.exitcode != 0 or len(results) == before:
                results.append(Failure(f"its process died (exit code {process.exitcode})"))
        process.kill()
        process.join()
        receiver.close()
    return results


def map_in_processes(function: Callable[[Any], Any], items: Sequence[Any], workers: int, seconds: float) -> list[Any]:
    """`[function(item) for item in items]`, with a Failure in the place of what raised, crashed or hung.

    Args:
        function: defined at the top of a module, so that a fresh interpreter can import it.
        items: dealt out to the workers in turn.
        workers: how many processes; 0 runs everything in this one.
        seconds: the longest an item may take, the start of its process included.
    """
    if workers == 0:
        return [guarded(function, item) for item in items]
    workers = min(workers, len(items))
    results: list[Any] = [None] * len(items)
    if not items:
        return results
    with ThreadPoolExecutor(workers) as threads:
        shares = threads.map(lambda share: _supervise(function, share, seconds), [items[start::workers] for start in range(workers)])
        for start, share in enumerate(shares):
            results[start::workers] = share
    return results
