"""Clocks: medians of a call from Python and replayed from a CUDA graph; the device's own copy and matrix-product rates."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from mmrec.measuring.failures import Failure, guarded
from mmrec.measuring.machine import synchronize

SHORT = 50.0  # ms; calls below are replayed from a graph
LONG = 1.0  # ms; of calls above a graph holds one for each set of inputs, of shorter ones IN_A_ROW at least
IN_A_ROW = 4
SLOW = 500.0  # ms; a call above is timed by hand: do_bench would repeat it ten times before its first figure
CPU_REPEATS = 5


def once(function: Callable[[], Any], where: torch.device) -> float:
    """Milliseconds of one call by the wall clock, the device waited for."""
    synchronize(where)
    begin = time.perf_counter()
    function()
    synchronize(where)
    return (time.perf_counter() - begin) * 1e3


def median_ms(function: Callable[[], Any], where: torch.device, repeat_ms: int = 100, warmup_ms: int = 25) -> float:
    """Median milliseconds of a call, compiled and warmed up before.

    Args:
        function: what to time; its results are thrown away.
        where: CUDA is timed by `do_bench` with events, the CPU by the wall clock.
        repeat_ms: how long to measure, in milliseconds; calls above a tenth of it are repeated ten times at least.
        warmup_ms: how long to run before that.
    """
    function()  # compiles
    if where.type == "cpu":
        return statistics.median(once(function, where) for _ in range(CPU_REPEATS))
    single = once(function, where)
    if single > SLOW:
        return statistics.median([single, once(function, where), once(function, where)])
    from triton.testing import do_bench

    # It clears the L2 cache before each call by writing a buffer larger than it.
    return float(do_bench(function, warmup=warmup_ms, rep=max(repeat_ms, int(10 * single)), return_mode="median"))


def replayed_ms(functions: Sequence[Callable[[], Any]], repeat_ms: int = 100, warmup_ms: int = 25) -> float:
    """Median milliseconds of a call's kernels alone: the functions, one after another in one CUDA graph that `do_bench` replays.

    What they return is kept until the capture ends, so that no two calls write the same memory.
    """
    from triton.testing import do_bench

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for function in functions:
            for _ in range(3):
                function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [function() for function in functions]
    del results
    return float(do_bench(graph.replay, warmup=warmup_ms, rep=repeat_ms, return_mode="median")) / len(functions)


class Clocked(NamedTuple):
    """Median milliseconds of a call.

    Attributes:
        ms: of its kernels, a call's share of several in a row (of one for each set of inputs, where long) replayed from one graph, as in a
            training step; a row's figure.
        alone_ms: of its kernels, one call replayed between two events: 3 … 7 µs more.
        eager_ms: of the call from Python, the host included.
        replayed: whether the first two come from graphs; they are `eager_ms` otherwise.
    """

    ms: float
    alone_ms: float
    eager_ms: float
    replayed: bool


def kernel_ms(
    functions: Sequence[Callable[[], Any]], where: torch.device, graphs: bool = True, repeat_ms: int = 100, warmup_ms: int = 25
) -> Clocked:
    """Time a call, given once for each set of inputs, in all three ways; `repeat_ms` and `warmup_ms` as `median_ms`'s.

    A call of some 0.1 ms is launched more slowly than it runs, autograd's part above all; in a training step the host keeps ahead. One
    that cannot be captured in a graph, or is long enough, is timed from Python alone.
    """
    eager = median_ms(rotating(functions), where, repeat_ms, warmup_ms)
    if not graphs or where.type == "cpu" or eager > SHORT:
        return Clocked(eager, eager, eager, False)
    in_a_row = [*functions] * (1 if eager > LONG else -(-IN_A_ROW // len(functions)))
    found = guarded(lambda calls: (replayed_ms(calls, repeat_ms, warmup_ms), replayed_ms(calls[:1], 30, 10)), in_a_row)
    if isinstance(found, Failure):
        print(f"no graph: {found.reason}", flush=True)
        return Clocked(eager, eager, eager, False)
    ms, alone = found
    return Clocked(ms, alone, eager, True)


def rotating(functions: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """One function that calls the given ones in turn, a different one each time."""
    turn = itertools.cycle(functions)
    return lambda: next(turn)()


def input_sets(moved: int, where: torch.device) -> int:
    """How many sets of inputs to rotate among so that a call finds none of its own in the cache: one where a call alone overflows it."""
    if where.type == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(where).L2_cache_size
    return 1 if moved > 8 * cache else min(8, 1 + -(-2 * cache // max(moved, 1)))


def copy_rate(where: torch.device) -> float:
    """Terabytes a second of a device-to-device copy, read and write counted: 1 GiB of random bf16 (16 MiB on a CPU)."""
    source = torch.randn(2**23 if where.type == "cpu" else 2**29, device=where, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source), where) / 1e9


def product_rate(where: torch.device) -> float:
    """Teraflops a second of an 8192³ bf16 matrix product of random data (512³ fp32 on a CPU)."""
    size, dtype = (512, torch.float32) if where.type == "cpu" else (8192, torch.bfloat16)
    a, b = (torch.randn(size, size, device=where, dtype=dtype) for _ in range(2))
    return 2 * size**3 / median_ms(lambda: a @ b, where) / 1e9
