"""Tile sizes of the kernels: read from a table made once by `benchmarks/tune_operators.py`, never searched for at run time.

A search at the first call costs minutes, and ranks that choose differently diverge. The table is data: `tables/sm90.json`, by kernel
and shape class, with the machine on which it was found.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

_TABLES = Path(__file__).parent / "tables"
_FALLBACK = "sm90"  # for architectures that nobody has tuned on: right everywhere, fast on Hopper
_OVERRIDES: dict[str, dict[str, Any]] = {}
_GENERATION = [0]  # counts the changes of _OVERRIDES: what is remembered of launches belongs to one of them
_DEPTH = [0]  # of `overridden` blocks


@cache
def architecture(device_index: int | None) -> str:
    """Name of the table for a CUDA device, `sm90` say; None (a CPU under the interpreter) takes the fallback's."""
    if device_index is None:
        return _FALLBACK
    name = "sm{}{}".format(*torch.cuda.get_device_capability(device_index))
    return name if (_TABLES / f"{name}.json").exists() else _FALLBACK


@cache
def read_table(name: str) -> dict[str, Any]:
    """The whole table of an architecture, machine and versions included."""
    table: dict[str, Any] = json.loads((_TABLES / f"{name}.json").read_text(encoding="utf-8"))
    return table


def launch_options(kernel: str, shape_class: str, device: torch.device) -> dict[str, Any]:
    """Compile-time options of a kernel, `num_warps` and tile sizes.

    Args:
        kernel: `operator.kernel`, `linear_scan.forward` say.
        shape_class: which of the kernel's rows; each launcher documents its own classes.
        device: where it runs.
    """
    if kernel in _OVERRIDES:
        return _OVERRIDES[kernel]
    options: dict[str, Any] = read_table(architecture(device.index if device.type == "cuda" else None))["kernels"][kernel][shape_class]
    return options


def channel_class(batch: int, channels: int) -> str:
    """`many` where stripes of 64 channels, or two warps of one channel a thread, fill the multiprocessors of a large GPU, else `few`."""
    return "many" if batch * channels > 8192 else "few"


@contextmanager
def overridden(**options: dict[str, Any]) -> Iterator[None]:
    """Run kernels with other options, for tuning and for tests: `overridden(**{"linear_scan.forward": {...}})`."""
    before = dict(_OVERRIDES)
    _OVERRIDES.update(options)
    _GENERATION[0] += 1
    _DEPTH[0] += 1
    try:
        yield
    finally:
        _OVERRIDES.clear()
        _OVERRIDES.update(before)
        _GENERATION[0] += 1
        _DEPTH[0] -= 1


def overrides() -> bool:
    """Whether launches run inside `overridden`."""
    return _DEPTH[0] > 0


def generation() -> int:
    """Changes with every change of the options: a key for what was derived from them."""
    return _GENERATION[0]
