"""Triton kernels of `gated_read_out`: a program takes some tokens of one head; every element is read once and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrec.ops.launching import Call, blocks, launch
from mmrec.ops.primitives import LOG2E
from mmrec.ops.sums import add_parts
from mmrec.ops.tiles import load_tile, store_tile, tile_of, tiles_and_warps, tokens_and_warps


@triton.jit
def load_gain(ptr, head, stride_h, stride_k, K: tl.constexpr, BK: tl.constexpr):
    """A head's gains, (1, BK) fp32."""
    columns = tl.arange(0, BK).to(tl.int64)
    return tl.load(ptr + head * stride_h + columns * stride_k, mask=columns < K, other=0.0).to(tl.float32)[None, :]


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    r_ptr,
    h_ptr,
    e_ptr,
    g_r_ptr,
    g_h_ptr,
    y_ptr,
    T,
    H,
    r_stride_b,
    r_stride_t,
    r_stride_h,
    r_stride_k,
    h_stride_b,
    h_stride_t,
    h_stride_h,
    h_stride_k,
    e_stride_b,
    e_stride_t,
    e_stride_h,
    e_stride_k,
    g_r_stride_h,
    g_r_stride_k,
    g_h_stride_h,
    g_h_stride_k,
    y_stride_b,
    y_stride_t,
    eps,
    K: tl.constexpr,
    M: tl.constexpr,
    BK: tl.constexpr,
):
    batch, head, first = tile_of(T, H, M)
    r = load_tile(r_ptr, batch, head, first, r_stride_b, r_stride_t, r_stride_h, r_stride_k, T, K, M, BK)
    h = load_tile(h_ptr, batch, head, first, h_stride_b, h_stride_t, h_stride_h, h_stride_k, T, K, M, BK)
    e = load_tile(e_ptr, batch, head, first, e_stride_b, e_stride_t, e_stride_h, e_stride_k, T, K, M, BK)
    y = r * tl.rsqrt(tl.sum(r * r, 1) / K + eps)[:, None] * load_gain(g_r_ptr, head, g_r_stride_h, g_r_stride_k, K, BK)
    y += h * tl.rsqrt(tl.sum(h * h, 1) / K + eps)[:, None] * load_gain(g_h_ptr, head, g_h_stride_h, g_h_stride_k, K, BK)
    store_tile(y_ptr, y * sigmoid(e), batch, head, first, y_stride_b, y_stride_t, K, 1, T, K, M, BK)


@triton.jit
def through_norm(x, weighted, gain, eps, K: tl.constexpr):
    """Of `x · rsqrt(mean x² + eps) · gain`: the normed x, and the cotangent before it."""
    scale = tl.rsqrt(tl.sum(x * x, 1) / K + eps)[:, None]
    unit = x * scale
    d_unit = weighted * gain
    return unit, scale * (d_unit - unit * (tl.sum(unit * d_unit, 1) / K)[:, None])


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    dy_ptr,
    r_ptr,
    h_ptr,
    e_ptr,
    g_r_ptr,
    g_h_ptr,
    dr_ptr,
    dh_ptr,
    de_ptr,
    dg_parts_ptr,
    T,
    H,
    dy_stride_b,
    dy_stride_t,
    dy_stride_h,
    dy_stride_k,
    r_stride_b,
    r_stride_t,
    r_stride_h,
    r_stride_k,
    h_stride_b,
    h_stride_t,
    h_stride_h,
    h_stride_k,
    e_stride_b,
    e_stride_t,
    e_stride_h,
    e_stride_k,
    g_r_stride_h,
    g_r_stride_k,
    g_h_stride_h,
    g_h_stride_k,
    dr_stride_b,
    dr_stride_t,
    dr_stride_h,
    dr_stride_k,
    dh_stride_b,
    dh_stride_t,
    dh_stride_h,
    dh_stride_k,
    de_stride_b,
    de_stride_t,
    de_stride_h,
    de_stride_k,
    parts_stride_gain,
    eps,
    K: tl.constexpr,
    LOOP: tl.constexpr,
    STAGES: tl.constexpr,
    M: tl.constexpr,
    BK: tl.constexpr,
):
    """The gains' gradients leave as one row a program, (2, programs of a head, H, K), to be summed in a fixed order."""
    batch, head, begin = tile_of(T, H, M * LOOP)
    g_r = load_gain(g_r_ptr, head, g_r_stride_h, g_r_stride_k, K, BK)
    g_h = load_gain(g_h_ptr, head, g_h_stride_h, g_h_stride_k, K, BK)
    dg_r = tl.zeros((M, BK), tl.float32)
    dg_h = tl.zeros((M, BK), tl.float32)
    for tile in tl.range(0, LOOP, num_stages=STAGES):
        first = begin + tile * M
        dy = load_tile(dy_ptr, batch, head, first, dy_stride_b, dy_stride_t, dy_stride_h, dy_stride_k, T, K, M, BK)
        gate = sigmoid(load_tile(e_ptr, batch, head, first, e_stride_b, e_stride_t, e_stride_h, e_stride_k, T, K, M, BK))
        weighted = dy * gate
        r = load_tile(r_ptr, batch, head, first, r_stride_b, r_stride_t, r_stride_h, r_stride_k, T, K, M, BK)
        recalled, dr = through_norm(r, weighted, g_r, eps, K)
        store_tile(dr_ptr, dr, batch, head, first, dr_stride_b, dr_stride_t, dr_stride_h, dr_stride_k, T, K, M, BK)
        h = load_tile(h_ptr, batch, head, first, h_stride_b, h_stride_t, h_stride_h, h_stride_k, T, K, M, BK)
        recent, dh = through_norm(h, weighted, g_h, eps, K)
        store_tile(dh_ptr, dh, batch, head, first, dh_stride_b, dh_stride_t, dh_stride_h, dh_stride_k, T, K, M, BK)
        de = weighted * (1.0 - gate) * (recalled * g_r + recent * g_h)
        store_tile(de_ptr, de, batch, head, first, de_stride_b, de_stride_t, de_stride_h, de_stride_k, T, K, M, BK)
        dg_r += weighted * recalled
        dg_h += weighted * recent
    columns = tl.arange(0, BK)
    parts = dg_parts_ptr + tl.program_id(0).to(tl.int64) * K + columns  # a head's programs are H apart: rows (program, head)
    tl.store(parts, tl.sum(dg_r, 0), mask=columns < K)
    tl.store(parts + parts_stride_gain, tl.sum(dg_h, 0), mask=columns < K)


def launch_forward(r: Tensor, h: Tensor, e: Tensor, g_r: Tensor, g_h: Tensor, eps: float) -> Tensor:
    """The gated read-out (B, T, H, K), contiguous in the dtype of `e`; inputs with any strides."""
    batch, time, heads, width = r.shape
    y = torch.empty(e.shape, dtype=e.dtype, device=e.device)

    def prepare() -> Call:
        options = tokens_and_warps(time, width)
        numbers = (time, heads, *(stride for tensor in (r, h, e, g_r, g_h) for stride in tensor.stride()), *y.stride()[:2], eps)
        return Call((batch * blocks(time, options["M"]) * heads,), numbers, {"K": width} | options)

    launch(forward_kernel, (r, h, e, g_r, g_h, y), prepare, eps)
    return y


def launch_backward(
    dy: Tensor,
    r: Tensor,
    h: Tensor,
    e: Tensor,
    g_r: Tensor,
    g_h: Tensor,
    eps: float,
    dr: Tensor,
    dh: Tensor,
    de: Tensor,
    dg_r: Tensor,
    dg_h: Tensor,
) -> None:
    """Write the gradients into the given tensors, of any strides and dtypes."""
    batch, time, heads, width = r.shape
    options = tiles_and_warps(time, width)
    tiles = batch * blocks(time, options["M"] * options["LOOP"])
    parts = torch.empty((2, tiles, heads, width), dtype=torch.float32, device=r.device)

    def prepare() -> Call:
        inputs = (stride for tensor in (dy, r, h, e, g_r, g_h) for stride in tensor.stride())
        outputs = (stride for tensor in (dr, dh, de) for stride in tensor.stride())
        return Call((tiles * heads,), (time, heads, *inputs, *outputs, parts.stride(0), eps), {"K": width} | options)

    launch(backward_kernel, (dy, r, h, e, g_r, g_h, dr, dh, de, parts), prepare, eps)
    add_parts(parts, dg_r, dg_h)
