"""The Triton kernel of `window_attention`'s backward for dq, and what is summed a query (derived in README.md)."""

import triton
import triton.language as tl

from mmrec.ops.memory_scan.kernels import load_rows, locate, store_rows
from mmrec.ops.primitives import LOG2E
from mmrec.ops.window_attention.kernels import (
    first_visible,
    group_sum,
    inner_products,
    load_tile,
    own_decays,
    row_pointers,
    walk_over_keys,
)


@triton.jit
def _block_of_keys(
    dq,
    others,
    n0,
    q,
    dr,
    shift,
    delta,
    token,
    first,
    anchor,
    whole_begin,
    whole_end,
    temperature,
    k_pointers,
    v_pointers,
    q_ptr,
    k_ptr,
    v_ptr,
    dr_ptr,
    c_ptr,
    local_ptr,
    row0,
    k0,
    q_stride_t,
    q_stride_k,
    k_stride_t,
    k_stride_k,
    v_stride_t,
    v_stride_v,
    dr_stride_t,
    dr_stride_v,
    T,
    S,
    K: tl.constexpr,
    V: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    G: tl.constexpr,
    DOT: tl.constexpr,
    CUT: tl.constexpr,
):
    """What the keys from `n0` on add to dq and to the sums of dS over a query's other keys."""
    k = load_tile(k_pointers, n0, k_stride_t, S, k0, K, BN, BK, CUT).to(DOT)
    v = load_tile(v_pointers, n0, v_stride_t, S, 0, V, BN, BV, CUT).to(DOT)
    c_key = tl.load(local_ptr + n0 + tl.arange(0, BN))
    distance = (group_sum(c_ptr, n0, G) - anchor).to(tl.float32)
    products = inner_products(q, k, q_ptr, k_ptr, row0, n0, q_stride_t, q_stride_k, k_stride_t, k_stride_k, T, S, K, BM, BN, BK, DOT)
    dP = inner_products(dr, v, dr_ptr, v_ptr, row0, n0, dr_stride_t, dr_stride_v, v_stride_t, v_stride_v, T, S, V, BM, BN, BV, DOT)
    scores = (products * temperature - c_key[None, :]) + (shift - distance)[:, None]
    if (n0 < whole_begin) | (n0 + BN > whole_end):
        key = n0 + tl.arange(0, BN)
        # A query's own key is not among the others.
        scores = tl.where((key[None, :] < token[:, None]) & (key[None, :] >= first[:, None]), scores, float("-inf"))
    dS = tl.exp2(scores) * (dP - delta[:, None])
    return tl.dot(dS.to(DOT), k, dq, input_precision="ieee"), others + tl.sum(dS, 1)


@triton.jit(do_not_specialize=["T", "S", "window"])
def queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dr_ptr,
    r_ptr,
    c_ptr,
    local_ptr,
    temperature_ptr,
    first_ptr,
    lse_ptr,
    dq_ptr,
    delta_ptr,
    others_ptr,
    shift_ptr,
    parts_ptr,
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
    r_stride_b,
    r_stride_t,
    r_stride_h,
    r_stride_v,
    temperature_stride_h,
    dq_stride_b,
    dq_stride_t,
    dq_stride_h,
    dq_stride_k,
    local_stride,
    row_stride,
    T,
    S,
    H,
    window,
    K: tl.constexpr,
    V: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    G: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BM queries of one head, BK columns of dq; δ = ⟨dr, r⟩, the sums of dS over a query's other keys, and a share of dtemperature."""
    k_blocks: tl.constexpr = tl.cdiv(K, BK)
    part, batch, head, batch_head = locate(k_blocks * tl.cdiv(T, BM), H)
    k0 = (part % k_blocks) * BK
    block = part // k_blocks
    row0 = block * BM
    past = S - T
    q_ptr += batch * q_stride_b + head * q_stride_h
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    dr_ptr += batch * dr_stride_b + head * dr_stride_h
    r_ptr += batch * r_stride_b + head * r_stride_h
    c_ptr += batch_head * S
    local_ptr += batch_head * local_stride
    if first_ptr is not None:
        first_ptr += batch * T
    temperature = tl.load(temperature_ptr + head * temperature_stride_h).to(tl.float32)

    row = row0 + tl.arange(0, BM)
    token = past + row
    first = first_visible(first_ptr, row, past, window, T)
    anchor = group_sum(c_ptr + past, row0, G)
    # A query's decay and what its weights are divided by, in one; −∞ past the end, so that a row there has no weight.
    lse = tl.load(lse_ptr + batch_head * T + row, mask=row < T, other=float("inf")) * LOG2E
    shift = own_decays(c_ptr, token, anchor, S) - lse
    q = load_rows(q_ptr, row0, q_stride_t, q_stride_k, T, k0, K, BM, BK).to(DOT)
    dr = load_rows(dr_ptr, row0, dr_stride_t, dr_stride_v, T, 0, V, BM, BV).to(DOT)
    delta = tl.zeros((BM,), tl.float32)
    for column in tl.range(0, V, BV):
        dr_part = load_rows(dr_ptr, row0, dr_stride_t, dr_stride_v, T, column, V, BM, BV).to(tl.float32)
        r_part = load_rows(r_ptr, row0, r_stride_t, r_stride_v, T, column, V, BM, BV).to(tl.float32)
        delta += tl.sum(dr_part * r_part, 1)

    k_pointers = row_pointers(k_ptr, k_stride_t, k_stride_k, k0, BN, BK)
    v_pointers = row_pointers(v_ptr, v_stride_t, v_stride_v, 0, BN, BV)
    begin, end, whole_begin = walk_over_keys(first_ptr, row0, past, window, T, S, BM, BN)
    whole_end = past + row0
    dq = tl.zeros((BM, BK), tl.float32)
    others = tl.zeros((BM,), tl.float32)
    cut = S // BN * BN
    operands = (
        q, dr, shift, delta, token, first, anchor, whole_begin, whole_end, temperature * LOG2E, k_pointers, v_pointers,
        q_ptr, k_ptr, v_ptr, dr_ptr, c_ptr, local_ptr, row0, k0, q_stride_t, q_stride_k, k_stride_t, k_stride_k, v_stride_t, v_stride_v,
        dr_stride_t, dr_stride_v, T, S,
    )  # fmt: skip
    for n0 in tl.range(begin, tl.minimum(end, cut), BN, num_stages=STAGES):
        dq, others = _block_of_keys(dq, others, n0, *operands, K, V, BM, BN, BK, BV, G, DOT, False)
    if end > cut:
        dq, others = _block_of_keys(dq, others, cut, *operands, K, V, BM, BN, BK, BV, G, DOT, True)

    # A query's sum over all of its keys is zero: its own key gets what is left. δ would not say it exactly where that is nearly nothing.
    k = load_rows(k_ptr, past + row0, k_stride_t, k_stride_k, S, k0, K, BM, BK).to(tl.float32)
    dq -= others[:, None] * k
    # dτ = ⟨q, dq⟩ / τ: of every block of columns its share.
    part_of_tau = tl.sum(tl.sum(dq * q.to(tl.float32), 1), 0)
    tl.store(parts_ptr + ((batch * tl.cdiv(T, BM) + block) * k_blocks + part % k_blocks) * H + head, part_of_tau)
    store_rows(dq_ptr + batch * dq_stride_b + head * dq_stride_h, dq * temperature, row0, dq_stride_t, dq_stride_k, T, k0, K, BM, BK)
    if k0 == 0:
        tl.store(delta_ptr + batch_head * row_stride + row, delta, mask=row < T)
        tl.store(others_ptr + batch_head * T + row, others, mask=row < T)
        tl.store(shift_ptr + batch_head * row_stride + row, shift, mask=row < T)
