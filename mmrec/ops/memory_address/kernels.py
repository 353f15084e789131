"""Triton kernels of `memory_address`: a program takes some tokens of one head; every element is read once and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrec.ops.launching import Call, blocks, launch, strides
from mmrec.ops.tiles import BACKWARD, load_tile, store_tile, tile_of, tokens_and_warps

EPS = tl.constexpr(1e-6)


@triton.jit
def norm_scale(s):
    """`rsqrt(Σs² + 1e-6)` of every row of (M, BK)."""
    return tl.rsqrt(tl.sum(s * s, 1) + EPS)


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    q_ptr,
    k_ptr,
    h_ptr,
    q_out_ptr,
    k_out_ptr,
    q_scale_ptr,
    k_scale_ptr,
    T,
    H,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    q_stride_k,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    k_stride_k,
    h_stride_b,
    h_stride_t,
    h_stride_h,
    h_stride_k,
    out_stride_b,
    out_stride_t,
    K: tl.constexpr,
    M: tl.constexpr,
    BK: tl.constexpr,
):
    batch, head, first = tile_of(T, H, M)
    h = load_tile(h_ptr, batch, head, first, h_stride_b, h_stride_t, h_stride_h, h_stride_k, T, K, M, BK)
    q = load_tile(q_ptr, batch, head, first, q_stride_b, q_stride_t, q_stride_h, q_stride_k, T, K, M, BK) + h
    k = load_tile(k_ptr, batch, head, first, k_stride_b, k_stride_t, k_stride_h, k_stride_k, T, K, M, BK) + h
    q_scale = norm_scale(q)
    k_scale = norm_scale(k)
    q *= q_scale[:, None]
    k *= k_scale[:, None]
    if q_scale_ptr is not None:
        rows = first + tl.arange(0, M)
        places = (batch * T + rows) * H + head
        tl.store(q_scale_ptr + places, q_scale, mask=rows < T)
        tl.store(k_scale_ptr + places, k_scale, mask=rows < T)
    store_tile(q_out_ptr, q, batch, head, first, out_stride_b, out_stride_t, K, 1, T, K, M, BK)
    store_tile(k_out_ptr, k, batch, head, first, out_stride_b, out_stride_t, K, 1, T, K, M, BK)


@triton.jit
def through_norm(gradient, unit, scale):
    """The cotangent before `unit = s · scale`, rows of (M, BK), with `scale` (M,) from `norm_scale(s)`."""
    return scale[:, None] * (gradient - unit * tl.sum(unit * gradient, 1)[:, None])


@triton.jit
def load_scale(ptr, batch, head, first, stride_b, stride_t, stride_h, T, M: tl.constexpr):
    """The scales of M tokens of one head, zeros past the end."""
    rows = first + tl.arange(0, M)
    return tl.load(ptr + batch * stride_b + head * stride_h + rows * stride_t, mask=rows < T, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    dq_out_ptr,
    dk_out_ptr,
    q_ptr,
    k_ptr,
    h_ptr,
    dq_ptr,
    dk_ptr,
    dh_ptr,
    dh_more_ptr,
    q_scale_ptr,
    k_scale_ptr,
    T,
    H,
    dq_out_stride_b,
    dq_out_stride_t,
    dq_out_stride_h,
    dq_out_stride_k,
    dk_out_stride_b,
    dk_out_stride_t,
    dk_out_stride_h,
    dk_out_stride_k,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    q_stride_k,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    k_stride_k,
    h_stride_b,
    h_stride_t,
    h_stride_h,
    h_stride_k,
    dq_stride_b,
    dq_stride_t,
    dq_stride_h,
    dq_stride_k,
    dk_stride_b,
    dk_stride_t,
    dk_stride_h,
    dk_stride_k,
    dh_stride_b,
    dh_stride_t,
    dh_stride_h,
    dh_stride_k,
    dh_more_stride_b,
    dh_more_stride_t,
    dh_more_stride_h,
    dh_more_stride_k,
    q_scale_stride_b,
    q_scale_stride_t,
    q_scale_stride_h,
    k_scale_stride_b,
    k_scale_stride_t,
    k_scale_stride_h,
    K: tl.constexpr,
    M: tl.constexpr,
    BK: tl.constexpr,
):
    """`q` and `k` are what the norms were taken of, less `h`; or, without `h`, the addresses themselves, whose scales are given."""
    batch, head, first = tile_of(T, H, M)
    q = load_tile(q_ptr, batch, head, first, q_stride_b, q_stride_t, q_stride_h, q_stride_k, T, K, M, BK)
    k = load_tile(k_ptr, batch, head, first, k_stride_b, k_stride_t, k_stride_h, k_stride_k, T, K, M, BK)
    if h_ptr is not None:
        h = load_tile(h_ptr, batch, head, first, h_stride_b, h_stride_t, h_stride_h, h_stride_k, T, K, M, BK)
        q += h
        k += h
        q_scale = norm_scale(q)
        k_scale = norm_scale(k)
        q *= q_scale[:, None]
        k *= k_scale[:, None]
    else:
        q_scale = load_scale(q_scale_ptr, batch, head, first, q_scale_stride_b, q_scale_stride_t, q_scale_stride_h, T, M)
        k_scale = load_scale(k_scale_ptr, batch, head, first, k_scale_stride_b, k_scale_stride_t, k_scale_stride_h, T, M)
    dq = load_tile(dq_out_ptr, batch, head, first, dq_out_stride_b, dq_out_stride_t, dq_out_stride_h, dq_out_stride_k, T, K, M, BK)
    dq = through_norm(dq, q, q_scale)
    store_tile(dq_ptr, dq, batch, head, first, dq_stride_b, dq_stride_t, dq_stride_h, dq_stride_k, T, K, M, BK)
    dk = load_tile(dk_out_ptr, batch, head, first, dk_out_stride_b, dk_out_stride_t, dk_out_stride_h, dk_out_stride_k, T, K, M, BK)
    dk = through_norm(dk, k, k_scale)
    store_tile(dk_ptr, dk, batch, head, first, dk_stride_b, dk_stride_t, dk_stride_h, dk_stride_k, T, K, M, BK)
    dh = dq + dk
    if dh_more_ptr is not None:
        dh += load_tile(
            dh_more_ptr, batch, head, first, dh_more_stride_b, dh_more_stride_t, dh_more_stride_h, dh_more_stride_k, T, K, M, BK
        )
    store_tile(dh_ptr, dh, batch, head, first, dh_stride_b, dh_stride_t, dh_stride_h, dh_stride_k, T, K, M, BK)


def launch_forward(q: Tensor, k: Tensor, h: Tensor, q_scale: Tensor | None = None, k_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Both addresses (B, T, H, K), contiguous; inputs with any strides.

    What the norms multiplied by goes into `q_scale` and `k_scale`, (B, T, H) fp32 and contiguous, where these are given.
    """
    batch, time, heads, width = q.shape
    q_out, k_out = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k))

    def prepare() -> Call:
        options = tokens_and_warps(time, width)
        numbers = (time, heads, *q.stride(), *k.stride(), *h.stride(), *q_out.stride()[:2])
        return Call((batch * blocks(time, options["M"]) * heads,), numbers, {"K": width} | options)

    launch(forward_kernel, (q, k, h, q_out, k_out, q_scale, k_scale), prepare)
    return q_out, k_out


def launch_backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    h: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dh: Tensor,
    dh_more: Tensor | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
) -> None:
    """Write the three gradients (B, T, H, K), views of any strides and dtypes; `dh_more` is added to `dh`.

    Without `h`, `q` and `k` are the addresses and the scales are given, (B, T, H).
    """
    batch, time, heads, width = q.shape
    wide, scales = (dq_out, dk_out, q, k, h, dq, dk, dh, dh_more), (q_scale, k_scale)

    def prepare() -> Call:
        options = tokens_and_warps(time, width, BACKWARD)
        numbers = (*(n for tensor in wide for n in strides(tensor, 4)), *(n for tensor in scales for n in strides(tensor, 3)))
        return Call((batch * blocks(time, options["M"]) * heads,), (time, heads, *numbers), {"K": width} | options)

    launch(backward_kernel, (*wide, *scales), prepare)
