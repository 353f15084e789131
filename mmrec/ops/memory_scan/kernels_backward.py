"""The Triton kernel of `memory_scan` for dq, dk and dlog α (derived in README.md); dv comes from those of `kernels.py`.

Where q and k are addresses, `memory_address`'s, it goes on through their norms to what these were taken of.
"""

import triton
import triton.language as tl

from mmrec.ops.memory_address.kernels import through_norm
from mmrec.ops.memory_scan.kernels import decay_within, final_decay, initial_decay, load_decays, load_rows, locate, store_rows, wide


@triton.jit
def load_scale(ptr, first, stride_t, T, C: tl.constexpr):
    """What the norms of a chunk's tokens multiplied by, (C,), zeros past the end."""
    rows = first + tl.arange(0, C)
    return tl.load(ptr + rows.to(tl.int64) * stride_t, mask=rows < T, other=0.0).to(tl.float32)


@triton.jit(
    do_not_specialize=[
        "T",
        "log_stride_b",
        "reset_stride_b",
        "dlog_stride_block",
        "dlog_stride_b",
        "q_scale_stride_b",
        "k_scale_stride_b",
    ]
)
def gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dr_ptr,
    log_ptr,
    reset_ptr,
    M_ptr,
    dM_ptr,
    dq_ptr,
    dk_ptr,
    dlog_ptr,
    q_scale_ptr,
    k_scale_ptr,
    dh_more_ptr,
    dh_ptr,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    q_stride_k,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    k_stride_k,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    v_stride_v,
    dr_stride_b,
    dr_stride_t,
    dr_stride_h,
    dr_stride_v,
    log_stride_b,
    log_stride_t,
    log_stride_h,
    reset_stride_b,
    reset_stride_t,
    dq_stride_b,
    dq_stride_t,
    dq_stride_h,
    dq_stride_k,
    dk_stride_b,
    dk_stride_t,
    dk_stride_h,
    dk_stride_k,
    dlog_stride_block,
    dlog_stride_b,
    dlog_stride_t,
    dlog_stride_h,
    q_scale_stride_b,
    q_scale_stride_t,
    q_scale_stride_h,
    k_scale_stride_b,
    k_scale_stride_t,
    k_scale_stride_h,
    dh_more_stride_b,
    dh_more_stride_t,
    dh_more_stride_h,
    dh_more_stride_k,
    dh_stride_b,
    dh_stride_t,
    dh_stride_h,
    dh_stride_k,
    T,
    H,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    HAS_RESET: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One chunk, one head, BK columns of dq and dk, from the memory at the chunk's start and the gradient to it at the end.

    The gradient to log α is a sum over the columns of K: every program writes its share. With `dh_ptr`, for which BK has to cover the
    head, q and k are `(x + h) · scale`, dq and dk are those before the norm, and dh is the sum of both and, where given, of `dh_more`.
    """
    k_blocks: tl.constexpr = tl.cdiv(K, BK)
    N = tl.cdiv(T, C)
    part, batch, head, batch_head = locate(k_blocks * N, H)
    block = part % k_blocks
    chunk = part // k_blocks
    k0 = block * BK
    first = chunk * C
    q_ptr += batch * q_stride_b + head * q_stride_h
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    dr_ptr += batch * dr_stride_b + head * dr_stride_h
    log_ptr += batch * log_stride_b + head * log_stride_h
    if HAS_RESET:
        reset_ptr += batch * reset_stride_b
    dq_ptr += batch * dq_stride_b + head * dq_stride_h
    dk_ptr += batch * dk_stride_b + head * dk_stride_h
    dlog_ptr += wide(block) * dlog_stride_block + batch * dlog_stride_b + head * dlog_stride_h
    states = (batch_head * N + chunk) * K * V
    if dh_more_ptr is not None:
        dh_more_ptr += batch * dh_more_stride_b + head * dh_more_stride_h
    if dh_ptr is not None:
        q_scale_ptr += batch * q_scale_stride_b + head * q_scale_stride_h
        k_scale_ptr += batch * k_scale_stride_b + head * k_scale_stride_h
        dh_ptr += batch * dh_stride_b + head * dh_stride_h

    dP = tl.zeros((C, C), tl.float32)
    dq = tl.zeros((C, BK), tl.float32)
    dk = tl.zeros((C, BK), tl.float32)
    through = 0.0
    for v0 in tl.range(0, V, BV, num_stages=STAGES):
        v = load_rows(v_ptr, first, v_stride_t, v_stride_v, T, v0, V, C, BV).to(DOT)
        dr = load_rows(dr_ptr, first, dr_stride_t, dr_stride_v, T, v0, V, C, BV).to(DOT)
        M = load_rows(M_ptr + states, k0, V, 1, K, v0, V, BK, BV).to(DOT)
        dM = load_rows(dM_ptr + states, k0, V, 1, K, v0, V, BK, BV).to(DOT)
        dP = tl.dot(dr, tl.trans(v), dP, input_precision="ieee")
        dq = tl.dot(dr, tl.trans(M), dq, input_precision="ieee")
        dk = tl.dot(v, tl.trans(dM), dk, input_precision="ieee")
        # A use of the last product, so that all three are waited for here. Triton 3.6 gives M and dM, which registers read too, one buffer
        # fewer than other operands of asynchronous products: the next copies into them would be under way while these are still read.
        dk = tl.where(v0 < V, dk, 0.0)
        through += tl.sum(M.to(tl.float32) * dM.to(tl.float32))

    q = load_rows(q_ptr, first, q_stride_t, q_stride_k, T, k0, K, C, BK).to(DOT)
    k = load_rows(k_ptr, first, k_stride_t, k_stride_k, T, k0, K, C, BK).to(DOT)
    g, start, g_end, start_end = load_decays(log_ptr, reset_ptr, first, log_stride_t, reset_stride_t, T, C, HAS_RESET)

    # The gradient to log α_t: every pair (reader i, writer j) with j < t ≤ i, the initial memory among the writers and the end of the chunk
    # among the readers. Sums only, and no diagonal: differences would leave of a small gradient what rounding leaves. The pairs first, and
    # dq to its end before dk: registers are what limits this kernel, and so none of it waits in them as fp32 for longer than it must.
    dP *= decay_within(g, start, first, C, HAS_RESET, True) * scale
    dP_dot = dP.to(DOT)
    rows = tl.arange(0, C)
    past = rows[:, None] > rows[None, :]  # row t, column j < t
    pairs = tl.where(past, tl.dot(q, tl.trans(k), input_precision="ieee") * dP, 0.0).to(DOT)

    dq *= initial_decay(g, start, HAS_RESET)[:, None] * scale
    readers = tl.sum(q.to(tl.float32) * dq, 1)  # of the initial memory: the chunk's own part comes now
    dq = tl.dot(dP_dot, k, dq, input_precision="ieee")
    if dh_ptr is not None:
        dq = through_norm(dq, q.to(tl.float32), load_scale(q_scale_ptr, first, q_scale_stride_t, T, C))
    store_rows(dq_ptr, dq, first, dq_stride_t, dq_stride_k, T, k0, K, C, BK)

    dk *= final_decay(g, g_end, start_end, first, C, HAS_RESET)[:, None]
    writers = tl.sum(k.to(tl.float32) * dk, 1)  # for the readers after the chunk
    if dh_more_ptr is not None:  # asked for here, so that it is on its way during the product
        dh_more = load_rows(dh_more_ptr, first, dh_more_stride_t, dh_more_stride_k, T, k0, K, C, BK)
    dk = tl.dot(tl.trans(dP_dot), q, dk, input_precision="ieee")
    if dh_ptr is not None:
        dk = through_norm(dk, k.to(tl.float32), load_scale(k_scale_ptr, first, k_scale_stride_t, T, C))
        dh = dq + dk
        if dh_more_ptr is not None:
            dh += dh_more.to(tl.float32)
        store_rows(dh_ptr, dh, first, dh_stride_t, dh_stride_k, T, k0, K, C, BK)
    store_rows(dk_ptr, dk, first, dk_stride_t, dk_stride_k, T, k0, K, C, BK)

    from_t = tl.where(past, 0.0, 1.0).to(DOT)  # row t, column i ≥ t
    pairs = tl.dot(from_t, pairs, input_precision="ieee")
    dlog = tl.sum(tl.where(past, pairs + writers[None, :], readers[None, :]), 1)
    dlog += through * initial_decay(g_end, start_end, HAS_RESET)
    first_row = wide(first) * dlog_stride_t
    tl.store(dlog_ptr + first_row + rows * dlog_stride_t, dlog.to(dlog_ptr.dtype.element_ty), mask=first + rows < T)
