"""How many kernels a call launches, as the profiler saw them: all of it, and what runs under some of its modules."""

import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "mmrec.measured"
_CPU_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
_NO_KERNELS = ("Memcpy", "Memset")
# What the profiler's C++ writes of its own trace points, at a level above that of errors: no log level hides it alone.
_TRACE_POINT = re.compile(rb"USDT:[^\n]*profiler_(?:start|stop)\n")


class Launches(NamedTuple):
    """What one call launched.

    Attributes:
        marked: kernels under the modules asked for; on a CPU their matrix products. None where the call never ran the modules, and where
            the count is no multiple of their runs: over many layers the profiler was seen to name some kernels twice.
        names: of the kernels (of the operators on a CPU) that `marked` counts, in the order of their launch.
        total: kernels of the whole call; None on a CPU, which launches none.
    """

    marked: int | None
    names: list[str]
    total: int | None


@contextmanager
def _marking(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Every forward of the modules runs inside a range that the profiler sees."""
    ranges: list[Any] = []

    def enter(module: nn.Module, arguments: Any) -> None:
        ranges.append(record_function(_MARK))
        ranges[-1].__enter__()

    def leave(module: nn.Module, arguments: Any, output: Any) -> None:
        ranges.pop().__exit__(None, None, None)

    handles = [module.register_forward_pre_hook(enter) for module in modules]
    handles += [module.register_forward_hook(leave) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _without_trace_points() -> Iterator[None]:
    """Leave the profiler's two lines on its trace points, and its remark on cycles, out of the standard error; all else comes through."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as caught, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Profiler clears events at the end of each cycle")
            os.dup2(caught.fileno(), 2)
            try:
                yield
            finally:
                sys.stderr.flush()
                os.dup2(kept, 2)
                caught.seek(0)
                os.write(2, _TRACE_POINT.sub(b"", caught.read()))
    finally:
        os.close(kept)


def count_launches(call: Callable[[], Any], modules: Sequence[nn.Module], where: torch.device) -> Launches:
    """Run `call` once under torch.profiler and count.

    Args:
        call: warmed up before; what it compiles on its first run would be counted too.
        modules: the forward of these is counted apart.
        where: the device it runs on.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (where.type == "cuda")
    call()
    with _without_trace_points():
        with _marking(modules), profile(activities=activities) as recorded:
            call()
            if where.type == "cuda":
                torch.cuda.synchronize(where)
        events = list(recorded.events() or [])
    ranges = [event for event in events if event.name == _MARK and event.device_type == DeviceType.CPU]
    find = _kernels if where.type == "cuda" else _products
    names = [name for event in ranges for name in find(event)]
    total = None
    if where.type == "cuda":
        on_device = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
        total = len(_real(on_device))
    return Launches(len(names) if ranges and len(names) % len(ranges) == 0 else None, names, total)


def _real(kernels: Sequence[Any]) -> list[str]:
    """Names without copies, fills and the device's shadow of our own range."""
    return [kernel.name for kernel in kernels if not kernel.name.startswith(_NO_KERNELS) and kernel.name != _MARK]


def _kernels(event: Any) -> list[str]:
    return _real(event.kernels) + [name for child in event.cpu_children for name in _kernels(child)]


def _products(event: Any) -> list[str]:
    if event.name in _CPU_PRODUCTS:
        return [event.name]
    return [name for child in event.cpu_children for name in _products(child)]
