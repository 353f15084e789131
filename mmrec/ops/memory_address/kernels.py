"""Triton kernels of `memory_address`: a program takes some tokens of one head; every element is read once and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrec.ops.launching import Call, blocks, launch, strides
from mmrec.ops.tiles import BACKWARD, load_tile, store_tile, tile_of, tokens_and_warps

EPS = tl.constexpr(1e-6)


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    q_ptr,
    k_ptr,
    h_ptr,
    q_out_ptr,
    k_out_ptr,
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
    q *= tl.rsqrt(tl.sum(q * q, 1) + EPS)[:, None]
    k *= tl.rsqrt(tl.sum(k * k, 1) + EPS)[:, None]
    store_tile(q_out_ptr, q, batch, head, first, out_stride_b, out_stride_t, K, 1, T, K, M, BK)
    store_tile(k_out_ptr, k, batch, head, first, out_stride_b, out_stride_t, K, 1, T, K, M, BK)


@triton.jit
def through_norm(gradient, s):
    """The cotangent before `s · rsqrt(Σs² + 1e-6)`, rows of (M, BK)."""
    scale = tl.rsqrt(tl.sum(s * s, 1) + EPS)[:, None]
    unit = s * scale
    return scale * (gradient - unit * tl.sum(unit * gradient, 1)[:, None])


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
    K: tl.constexpr,
    M: tl.constexpr,
    BK: tl.constexpr,
):
    batch, head, first = tile_of(T, H, M)
    h = load_tile(h_ptr, batch, head, first, h_stride_b, h_stride_t, h_stride_h, h_stride_k, T, K, M, BK)
    q = load_tile(q_ptr, batch, head, first, q_stride_b, q_stride_t, q_stride_h, q_stride_k, T, K, M, BK) + h
    dq = load_tile(dq_out_ptr, batch, head, first, dq_out_stride_b, dq_out_stride_t, dq_out_stride_h, dq_out_stride_k, T, K, M, BK)
    dq = through_norm(dq, q)
    store_tile(dq_ptr, dq, batch, head, first, dq_stride_b, dq_stride_t, dq_stride_h, dq_stride_k, T, K, M, BK)
    k = load_tile(k_ptr, batch, head, first, k_stride_b, k_stride_t, k_stride_h, k_stride_k, T, K, M, BK) + h
    dk = load_tile(dk_out_ptr, batch, head, first, dk_out_stride_b, dk_out_stride_t, dk_out_stride_h, dk_out_stride_k, T, K, M, BK)
    dk = through_norm(dk, k)
    store_tile(dk_ptr, dk, batch, head, first, dk_stride_b, dk_stride_t, dk_stride_h, dk_stride_k, T, K, M, BK)
    dh = dq + dk
    if dh_more_ptr is not None:
        dh += load_tile(
            dh_more_ptr, batch, head, first, dh_more_stride_b, dh_more_stride_t, dh_more_stride_h, dh_more_stride_k, T, K, M, BK
        )
    store_tile(dh_ptr, dh, batch, head, first, dh_stride_b, dh_stride_t, dh_stride_h, dh_stride_k, T, K, M, BK)


def launch_forward(q: Tensor, k: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Both addresses (B, T, H, K), contiguous; inputs with any strides."""
    batch, time, heads, width = q.shape
    q_out, k_out = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k))

    def prepare() -> Call:
        options = tokens_and_warps(time, width)
        numbers = (time, heads, *q.stride(), *k.stride(), *h.stride(), *q_out.stride()[:2])
        return Call((batch * blocks(time, options["M"]) * heads,), numbers, {"K": width} | options)

    launch(forward_kernel, (q, k, h, q_out, k_out), prepare)
    return q_out, k_out


def launch_backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    h: Tensor,
    dq: Tensor,
    dk: Tensor,
    dh: Tensor,
    dh_more: Tensor | None = None,
) -> None:
    """Write the three gradients (B, T, H, K), views of any strides and dtypes; `dh_more` is added to `dh`."""
    batch, time, heads, width = q.shape
    tensors = (dq_out, dk_out, q, k, h, dq, dk, dh, dh_more)

    def prepare() -> Call:
        options = tokens_and_warps(time, width, BACKWARD)
        numbers = (time, heads, *(stride for tensor in tensors for stride in strides(tensor, 4)))
        return Call((batch * blocks(time, options["M"]) * heads,), numbers, {"K": width} | options)

    launch(backward_kernel, tensors, prepare)
