"""Launching a kernel without binding and specialising its arguments anew.

Triton looks at every argument of every launch to find the compiled kernel; with forty strides that takes longer than a kernel of a few
thousand tokens runs. Here one look-up by the tensors' shapes, strides, dtypes and alignment, all that the rest follows from, finds the
compiled kernel, its grid and its numbers as they were the last time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from mmrec.ops import tuning
from mmrec.ops.registration import INTERPRETED

_LIMIT = 4096  # lengths that vary without end would fill the memory; past this it starts anew
_KNOWN: dict[tuple[Any, ...], tuple[Any, tuple[int, ...], tuple[Any, ...]]] = {}


class Call(NamedTuple):
    """What a launch needs beside its tensors.

    Attributes:
        grid: programs, one to three numbers.
        numbers: the kernel's arguments that follow the tensors: sizes and strides, in order.
        named: its constants, and options such as `num_warps`.
    """

    grid: tuple[int, ...]
    numbers: tuple[Any, ...]
    named: dict[str, Any]


def launch(kernel: Any, tensors: tuple[Tensor | None, ...], prepare: Callable[[], Call], *constants: Any) -> None:
    """Run a kernel of Triton on the current stream of its tensors' device.

    Args:
        kernel: a function under `triton.jit` whose first arguments are the tensors.
        tensors: they; the first is not None.
        prepare: gives the rest, by nothing but the tensors' metadata and `constants`; asked only where these are new.
        constants: what else the rest depends on, hashable.
    """
    first = tensors[0]
    assert first is not None
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            launch(kernel, tensors, prepare, *constants)
        return
    key = (
        id(kernel),
        first.device.index,
        tuning.generation(),
        constants,
        *[None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() & 15) for t in tensors],
    )
    known = _KNOWN.get(key)
    if known is not None:
        compiled, grid, rest = known
        compiled[grid](*tensors, *rest)
        return
    grid, numbers, named = prepare()
    while True:
        try:
            compiled = kernel[grid](*tensors, *numbers, **named)
            break
        except OutOfResources:
            # A GPU with less shared memory than the table's: the same tiles, fewer of them on their way. Not where options are tried out.
            if named.get("STAGES", 1) == 1 or tuning.overrides():
                raise
            named = named | {"STAGES": named["STAGES"] - 1}
    if not INTERPRETED:
        if len(_KNOWN) >= _LIMIT:
            _KNOWN.clear()
        constexprs = tuple(named[name] for name in kernel.arg_names[len(tensors) + len(numbers) :])
        _KNOWN[key] = (compiled, (*grid, 1, 1)[:3], (*numbers, *constexprs))


def strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    """Strides of an argument, zeros for None."""
    return (0,) * count if tensor is None else tensor.stride()


def check_row_strides(operator: str, rows: int, *tensors: Tensor) -> None:
    """Refuse tensors (B, T, ...) of which `rows` tokens, a tile, span more than 32 bits can address: a kernel's offsets within a tile."""
    for tensor in tensors:
        if tensor.stride(1) * rows >= 2**31:
            raise ValueError(f"{operator}: {tensor.stride(1)} elements from one token to the next are too many; give a contiguous tensor")


def blocks(size: int, block: int) -> int:
    """How many blocks cover `size`. In plain Python: Triton's own functions for it take 7 µs a call outside of kernels."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The least power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()
