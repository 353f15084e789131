"""Sums over tokens in two stages and a fixed order: what programs leave behind, and the columns of a matrix.

torch's sum over the first dimension of some hundred rows takes 40 µs where the rows are read in 5: longer than the pass that wrote them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrec.ops.launching import Call, blocks, launch, power_of_two

_COLUMNS, _ROWS = 16, 512  # of a tile that a program adds up at a time; few columns, so that there are many programs
_FEW_ROWS = 16  # which torch adds up as fast
_STRIPE, _TOKENS = 128, 256  # of the first stage of `column_sum`


@triton.jit(do_not_specialize=["rows"])
def parts_kernel(parts_ptr, first_ptr, second_ptr, rows, width, parts_stride, BC: tl.constexpr, BR: tl.constexpr):
    """Column sums of (rows, width), or of two such matrices one after the other, each into a tensor of its own."""
    programs = tl.cdiv(width, BC)
    column = (tl.program_id(0) % programs) * BC + tl.arange(0, BC)
    source = parts_ptr + (tl.program_id(0) // programs).to(tl.int64) * parts_stride + column[None, :]
    total = tl.zeros((BR, BC), tl.float32)
    for start in range(0, rows, BR):
        row = start + tl.arange(0, BR)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        total += tl.load(source + row.to(tl.int64)[:, None] * width, mask=inside, other=0.0)
    sums = tl.sum(total, 0)
    if second_ptr is None or tl.program_id(0) < programs:
        tl.store(first_ptr + column, sums.to(first_ptr.dtype.element_ty), mask=column < width)
    else:
        tl.store(second_ptr + column, sums.to(second_ptr.dtype.element_ty), mask=column < width)


@triton.jit(do_not_specialize=["rows"])
def columns_kernel(x_ptr, parts_ptr, rows, width, x_stride, BC: tl.constexpr, BR: tl.constexpr, STEP: tl.constexpr):
    """Sums of BR rows, a program each and for BC columns."""
    programs = tl.cdiv(width, BC)
    part = tl.program_id(0) // programs
    column = (tl.program_id(0) % programs) * BC + tl.arange(0, BC)
    total = tl.zeros((STEP, BC), tl.float32)
    for start in tl.static_range(0, BR, STEP):
        row = part * BR + start + tl.arange(0, STEP)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        total += tl.load(x_ptr + row.to(tl.int64)[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(parts_ptr + part.to(tl.int64) * width + column, tl.sum(total, 0), mask=column < width)


def add_parts(parts: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """Sum programs' partial results over their first dimension, in a fixed order.

    Args:
        parts: (programs, ...) fp32, contiguous; with `second` (2, programs, ...).
        first, second: where the sums go, of any float dtype.
    """
    if second is None and parts.shape[0] <= _FEW_ROWS:
        if first.dtype == parts.dtype and first.is_contiguous():
            torch.sum(parts, 0, out=first)
        else:
            first.copy_(parts.sum(0))
        return
    targets = [first] if second is None else [first, second]
    written = [t if t.is_contiguous() else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in targets]
    rows, width = parts.shape[0 if second is None else 1], first.numel()

    def prepare() -> Call:
        grid = (len(targets) * blocks(width, _COLUMNS),)
        return Call(grid, (rows, width, rows * width), {"BC": _COLUMNS, "BR": min(_ROWS, power_of_two(rows)), "num_warps": 8})

    launch(parts_kernel, (parts, written[0], written[1] if second is not None else None), prepare)
    for target, values in zip(targets, written, strict=True):
        if values is not target:
            target.copy_(values)


def launch_column_sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums (C,) of a matrix (N, C) with adjacent columns over its rows, in `dtype`, added up in fp32."""
    rows, width = x.shape
    parts = torch.empty((blocks(rows, _TOKENS), width), dtype=torch.float32, device=x.device)

    def prepare() -> Call:
        grid = (parts.shape[0] * blocks(width, _STRIPE),)
        return Call(grid, (rows, width, x.stride(0)), {"BC": _STRIPE, "BR": _TOKENS, "STEP": 32, "num_warps": 4})

    launch(columns_kernel, (x, parts), prepare)
    sums = torch.empty(width, dtype=dtype, device=x.device)
    add_parts(parts, sums)
    return sums
