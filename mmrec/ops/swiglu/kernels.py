"""Triton kernels of `swiglu`: a program takes some tokens of 128 channels; every element is read once and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrec.ops.launching import Call, blocks, launch
from mmrec.ops.primitives import LOG2E
from mmrec.ops.tiles import BACKWARD, load_tile, store_tile, tile_of, tokens_and_warps

_COLUMNS = 128  # channels of a program


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    gate_up_ptr,
    y_ptr,
    T,
    F,
    gate_up_stride_b,
    gate_up_stride_t,
    gate_up_stride_d,
    y_stride_b,
    y_stride_t,
    M: tl.constexpr,
    BK: tl.constexpr,
):
    batch, stripe, first = tile_of(T, tl.cdiv(F, BK), M)
    width = F - stripe * BK
    up_ptr = gate_up_ptr + tl.cast(F, tl.int64) * gate_up_stride_d
    wide = gate_up_stride_d * BK
    gate = load_tile(gate_up_ptr, batch, stripe, first, gate_up_stride_b, gate_up_stride_t, wide, gate_up_stride_d, T, width, M, BK)
    up = load_tile(up_ptr, batch, stripe, first, gate_up_stride_b, gate_up_stride_t, wide, gate_up_stride_d, T, width, M, BK)
    y = gate / (1.0 + tl.exp2(-gate * LOG2E)) * up
    store_tile(y_ptr, y, batch, stripe, first, y_stride_b, y_stride_t, BK, 1, T, width, M, BK)


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    dy_ptr,
    gate_up_ptr,
    dgate_up_ptr,
    T,
    F,
    dy_stride_b,
    dy_stride_t,
    dy_stride_d,
    gate_up_stride_b,
    gate_up_stride_t,
    gate_up_stride_d,
    dgate_up_stride_b,
    dgate_up_stride_t,
    dgate_up_stride_d,
    M: tl.constexpr,
    BK: tl.constexpr,
):
    batch, stripe, first = tile_of(T, tl.cdiv(F, BK), M)
    width = F - stripe * BK
    up_ptr = gate_up_ptr + tl.cast(F, tl.int64) * gate_up_stride_d
    dup_ptr = dgate_up_ptr + tl.cast(F, tl.int64) * dgate_up_stride_d
    wide, dwide = gate_up_stride_d * BK, dgate_up_stride_d * BK
    gate = load_tile(gate_up_ptr, batch, stripe, first, gate_up_stride_b, gate_up_stride_t, wide, gate_up_stride_d, T, width, M, BK)
    up = load_tile(up_ptr, batch, stripe, first, gate_up_stride_b, gate_up_stride_t, wide, gate_up_stride_d, T, width, M, BK)
    dy = load_tile(dy_ptr, batch, stripe, first, dy_stride_b, dy_stride_t, dy_stride_d * BK, dy_stride_d, T, width, M, BK)
    sigmoid = 1.0 / (1.0 + tl.exp2(-gate * LOG2E))
    dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    store_tile(dgate_up_ptr, dgate, batch, stripe, first, dgate_up_stride_b, dgate_up_stride_t, dwide, dgate_up_stride_d, T, width, M, BK)
    dup = dy * gate * sigmoid
    store_tile(dup_ptr, dup, batch, stripe, first, dgate_up_stride_b, dgate_up_stride_t, dwide, dgate_up_stride_d, T, width, M, BK)


def launch_forward(gate_up: Tensor) -> Tensor:
    """(B, T, F), contiguous; (B, T, 2F) with any strides."""
    batch, time, both = gate_up.shape
    y = torch.empty((batch, time, both // 2), dtype=gate_up.dtype, device=gate_up.device)

    def prepare() -> Call:
        options = tokens_and_warps(time, _COLUMNS)
        grid = (batch * blocks(time, options["M"]) * blocks(both // 2, _COLUMNS),)
        return Call(grid, (time, both // 2, *gate_up.stride(), *y.stride()[:2]), options)

    launch(forward_kernel, (gate_up, y), prepare)
    return y


def launch_backward(dy: Tensor, gate_up: Tensor, dgate_up: Tensor) -> None:
    """Write the gradient (B, T, 2F), of any strides and dtype."""
    batch, time, width = dy.shape

    def prepare() -> Call:
        options = tokens_and_warps(time, _COLUMNS, BACKWARD)
        grid = (batch * blocks(time, options["M"]) * blocks(width, _COLUMNS),)
        return Call(grid, (time, width, *dy.stride(), *gate_up.stride(), *dgate_up.stride()), options)

    launch(backward_kernel, (dy, gate_up, dgate_up), prepare)
