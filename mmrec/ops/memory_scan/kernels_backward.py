"""The Triton kernel of `memory_scan` for dq, dk and dlog α (derived in README.md); dv comes from those of `kernels.py`."""

import triton
import triton.language as tl

from mmrec.ops.memory_scan.kernels import decay_within, final_decay, initial_decay, load_decays, load_rows, locate, store_rows, wide


@triton.jit(do_not_specialize=["T", "log_stride_b", "reset_stride_b", "dlog_stride_block", "dlog_stride_b"])
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

    The gradient to log α is a sum over the columns of K: every program writes its share.
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
        through += tl.sum(M.to(tl.float32) * dM.to(tl.float32))

    g, start, g_end, start_end = load_decays(log_ptr, reset_ptr, first, log_stride_t, reset_stride_t, T, C, HAS_RESET)
    dP *= decay_within(g, start, first, C, HAS_RESET, True) * scale
    dq *= initial_decay(g, start, HAS_RESET)[:, None] * scale
    dk *= final_decay(g, g_end, start_end, first, C, HAS_RESET)[:, None]
    q = load_rows(q_ptr, first, q_stride_t, q_stride_k, T, k0, K, C, BK).to(DOT)
    k = load_rows(k_ptr, first, k_stride_t, k_stride_k, T, k0, K, C, BK).to(DOT)

    # What the initial memory and the readers after the chunk add to dlog α: dq and dk have not got the chunk's own part yet.
    readers = tl.sum(q.to(tl.float32) * dq, 1)
    writers = tl.sum(k.to(tl.float32) * dk, 1)
    dP_dot = dP.to(DOT)
    dq = tl.dot(dP_dot, k, dq, input_precision="ieee")
    store_rows(dq_ptr, dq, first, dq_stride_t, dq_stride_k, T, k0, K, C, BK)
    dk = tl.dot(tl.trans(dP_dot), q, dk, input_precision="ieee")
    store_rows(dk_ptr, dk, first, dk_stride_t, dk_stride_k, T, k0, K, C, BK)

    # The gradient to log α_t: every pair (reader i, writer j) with j < t ≤ i, the initial memory among the writers and the end of the chunk
    # among the readers. Sums only, and no diagonal: differences would leave of a small gradient what rounding leaves.
    rows = tl.arange(0, C)
    past = rows[:, None] > rows[None, :]  # row t, column j < t
    pairs = tl.where(past, tl.dot(q, tl.trans(k), input_precision="ieee") * dP, 0.0)
    from_t = tl.where(past, 0.0, 1.0).to(DOT)  # row t, column i ≥ t
    pairs = tl.dot(from_t, pairs.to(DOT), input_precision="ieee")
    dlog = tl.sum(tl.where(past, pairs + writers[None, :], readers[None, :]), 1)
    dlog += through * initial_decay(g_end, start_end, HAS_RESET)
    first_row = wide(first) * dlog_stride_t
    tl.store(dlog_ptr + first_row + rows * dlog_stride_t, dlog.to(dlog_ptr.dtype.element_ty), mask=first + rows < T)
