"""Triton kernels of `planning_error`: a program takes some tokens of 128 channels and, of what was planned, those one token earlier."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrec.ops.launching import Call, blocks, launch, strides
from mmrec.ops.tiles import BACKWARD, tile_of, tokens_and_warps

_COLUMNS = 128  # channels of a program


@triton.jit
def load_error(
    updated_ptr,
    planned_ptr,
    first_ptr,
    counted_ptr,
    batch,
    stripe,
    start,
    T,
    E,
    updated_stride_b,
    updated_stride_t,
    updated_stride_e,
    planned_stride_b,
    planned_stride_t,
    planned_stride_e,
    first_stride_b,
    first_stride_e,
    counted_stride_b,
    counted_stride_t,
    M: tl.constexpr,
    BK: tl.constexpr,
):
    """The error (M, BK), zero where a token does not count or lies outside."""
    rows = start + tl.arange(0, M)
    columns = stripe * BK + tl.arange(0, BK).to(tl.int64)
    counted = tl.load(counted_ptr + batch * counted_stride_b + rows * counted_stride_t, mask=rows < T, other=0)
    used = ((counted != 0) & (rows < T))[:, None] & (columns < E)[None, :]
    updated = tl.load(
        updated_ptr + batch * updated_stride_b + rows[:, None] * updated_stride_t + columns[None, :] * updated_stride_e,
        mask=used,
        other=0.0,
    )
    later = used & (rows > 0)[:, None]
    planned = tl.load(
        planned_ptr + batch * planned_stride_b + (rows - 1)[:, None] * planned_stride_t + columns[None, :] * planned_stride_e,
        mask=later,
        other=0.0,
    )
    error = updated.to(tl.float32) - planned.to(tl.float32)
    if first_ptr is not None:
        first = tl.load(first_ptr + batch * first_stride_b + columns * first_stride_e, mask=columns < E, other=0.0)
        error = tl.where(used & (rows == 0)[:, None], error - first.to(tl.float32)[None, :], error)
    return error


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    updated_ptr,
    planned_ptr,
    first_ptr,
    counted_ptr,
    parts_ptr,
    T,
    E,
    updated_stride_b,
    updated_stride_t,
    updated_stride_e,
    planned_stride_b,
    planned_stride_t,
    planned_stride_e,
    first_stride_b,
    first_stride_e,
    counted_stride_b,
    counted_stride_t,
    M: tl.constexpr,
    BK: tl.constexpr,
):
    """A sum a program, to be added up in a fixed order."""
    batch, stripe, start = tile_of(T, tl.cdiv(E, BK), M)
    error = load_error(
        updated_ptr,
        planned_ptr,
        first_ptr,
        counted_ptr,
        batch,
        stripe,
        start,
        T,
        E,
        updated_stride_b,
        updated_stride_t,
        updated_stride_e,
        planned_stride_b,
        planned_stride_t,
        planned_stride_e,
        first_stride_b,
        first_stride_e,
        counted_stride_b,
        counted_stride_t,
        M,
        BK,
    )
    tl.store(parts_ptr + tl.program_id(0), tl.sum(tl.sum(error * error, 1), 0))


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    dtotal_ptr,
    updated_ptr,
    planned_ptr,
    first_ptr,
    counted_ptr,
    dupdated_ptr,
    dplanned_ptr,
    dfirst_ptr,
    T,
    E,
    updated_stride_b,
    updated_stride_t,
    updated_stride_e,
    planned_stride_b,
    planned_stride_t,
    planned_stride_e,
    first_stride_b,
    first_stride_e,
    counted_stride_b,
    counted_stride_t,
    dupdated_stride_b,
    dupdated_stride_t,
    dupdated_stride_e,
    dplanned_stride_b,
    dplanned_stride_t,
    dplanned_stride_e,
    dfirst_stride_b,
    dfirst_stride_e,
    M: tl.constexpr,
    BK: tl.constexpr,
):
    """The plan's gradient is the other's with the sign changed, one token earlier; the last token planned for nobody."""
    batch, stripe, start = tile_of(T, tl.cdiv(E, BK), M)
    error = load_error(
        updated_ptr,
        planned_ptr,
        first_ptr,
        counted_ptr,
        batch,
        stripe,
        start,
        T,
        E,
        updated_stride_b,
        updated_stride_t,
        updated_stride_e,
        planned_stride_b,
        planned_stride_t,
        planned_stride_e,
        first_stride_b,
        first_stride_e,
        counted_stride_b,
        counted_stride_t,
        M,
        BK,
    )
    gradient = error * (2.0 * tl.load(dtotal_ptr))
    rows = start + tl.arange(0, M)
    columns = stripe * BK + tl.arange(0, BK).to(tl.int64)
    inside = (rows < T)[:, None] & (columns < E)[None, :]
    dupdated = dupdated_ptr + batch * dupdated_stride_b + rows[:, None] * dupdated_stride_t + columns[None, :] * dupdated_stride_e
    tl.store(dupdated, gradient.to(dupdated_ptr.dtype.element_ty), mask=inside)
    dplanned = dplanned_ptr + batch * dplanned_stride_b + columns * dplanned_stride_e
    earlier = dplanned[None, :] + (rows - 1)[:, None] * dplanned_stride_t
    tl.store(earlier, (-gradient).to(dplanned_ptr.dtype.element_ty), mask=inside & (rows > 0)[:, None])
    if start + M >= T:
        last = dplanned + (tl.cast(T, tl.int64) - 1) * dplanned_stride_t
        tl.store(last, tl.zeros((BK,), dplanned_ptr.dtype.element_ty), mask=columns < E)
    if start == 0:
        dfirst = tl.sum(tl.where((rows == 0)[:, None], -gradient, 0.0), 0)
        tl.store(dfirst_ptr + batch * dfirst_stride_b + columns * dfirst_stride_e, dfirst.to(dfirst_ptr.dtype.element_ty), mask=columns < E)


def launch_forward(updated: Tensor, planned: Tensor, first: Tensor | None, counted: Tensor) -> Tensor:
    """The sum, 0-dim fp32; inputs with any strides."""
    batch, time, width = updated.shape
    options = tokens_and_warps(time, _COLUMNS)
    programs = batch * blocks(time, options["M"]) * blocks(width, _COLUMNS)
    parts = torch.empty(programs, dtype=torch.float32, device=updated.device)

    def prepare() -> Call:
        return Call((programs,), (time, width, *updated.stride(), *planned.stride(), *strides(first, 2), *counted.stride()), options)

    launch(forward_kernel, (updated, planned, first, counted, parts), prepare)
    return parts.sum()


def launch_backward(
    dtotal: Tensor,
    updated: Tensor,
    planned: Tensor,
    first: Tensor | None,
    counted: Tensor,
    dupdated: Tensor,
    dplanned: Tensor,
    dfirst: Tensor,
) -> None:
    """Write the gradients into the given tensors, of any strides and dtypes."""
    batch, time, width = updated.shape
    options = tokens_and_warps(time, _COLUMNS, BACKWARD)

    def prepare() -> Call:
        outputs = (*dupdated.stride(), *dplanned.stride(), *dfirst.stride())
        numbers = (time, width, *updated.stride(), *planned.stride(), *strides(first, 2), *counted.stride(), *outputs)
        return Call((batch * blocks(time, options["M"]) * blocks(width, _COLUMNS),), numbers, options)

    launch(backward_kernel, (dtotal, updated, planned, first, counted, dupdated, dplanned, dfirst), prepare)
