"""The Triton kernels of `window_attention`'s backward: one for dq and what is summed a query, one for dk and dv (derived in README.md)."""

import triton
import triton.language as tl

from mmrec.ops.memory_scan.kernels import load_rows, locate, store_rows
from mmrec.ops.primitives import LOG2E
from mmrec.ops.window_attention.kernels import begin_of_keys, first_visible, inner_products, load_decays, scores_of


@triton.jit
def load_lse(ptr, row, T):
    """In base 2; +∞ past the end, so that a row there has no weight."""
    return tl.load(ptr + row, mask=row < T, other=float("inf")) * LOG2E


@triton.jit(do_not_specialize=["T", "S", "window"])
def queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dr_ptr,
    r_ptr,
    c_ptr,
    temperature_ptr,
    first_ptr,
    lse_ptr,
    dq_ptr,
    delta_ptr,
    others_ptr,
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
    if first_ptr is not None:
        first_ptr += batch * T
    temperature = tl.load(temperature_ptr + head * temperature_stride_h).to(tl.float32)

    row = row0 + tl.arange(0, BM)
    first = first_visible(first_ptr, row, past, window, T)
    anchor = tl.load(c_ptr + past + row0)
    c_query = load_decays(c_ptr, past + row, anchor, S)
    lse = load_lse(lse_ptr + batch_head * T, row, T)
    delta = tl.zeros((BM,), tl.float32)
    for column in tl.range(0, V, BV):
        dr_part = load_rows(dr_ptr, row0, dr_stride_t, dr_stride_v, T, column, V, BM, BV).to(tl.float32)
        r_part = load_rows(r_ptr, row0, r_stride_t, r_stride_v, T, column, V, BM, BV).to(tl.float32)
        delta += tl.sum(dr_part * r_part, 1)

    q = load_rows(q_ptr, row0, q_stride_t, q_stride_k, T, k0, K, BM, BK).to(DOT)
    dr = load_rows(dr_ptr, row0, dr_stride_t, dr_stride_v, T, 0, V, BM, BV).to(DOT)
    dq = tl.zeros((BM, BK), tl.float32)
    others = tl.zeros((BM,), tl.float32)
    dtemperature = tl.zeros((BM,), tl.float32)
    for n0 in tl.range(begin_of_keys(first_ptr, row0, past, window, BN), tl.minimum(past + row0 + BM, S), BN, num_stages=STAGES):
        key = n0 + tl.arange(0, BN)
        k = load_rows(k_ptr, n0, k_stride_t, k_stride_k, S, k0, K, BN, BK).to(DOT)
        v = load_rows(v_ptr, n0, v_stride_t, v_stride_v, S, 0, V, BN, BV).to(DOT)
        products = inner_products(q, k, q_ptr, k_ptr, row0, n0, q_stride_t, q_stride_k, k_stride_t, k_stride_k, T, S, K, BM, BN, BK, DOT)
        dP = inner_products(dr, v, dr_ptr, v_ptr, row0, n0, dr_stride_t, dr_stride_v, v_stride_t, v_stride_v, T, S, V, BM, BN, BV, DOT)
        c_key = load_decays(c_ptr, key, anchor, S)
        token = (past + row)[:, None]
        scores = scores_of(products, temperature * LOG2E, c_query[:, None], c_key[None, :], token, first[:, None], key[None, :])
        dS = tl.exp2(scores - lse[:, None]) * (dP - delta[:, None])
        dS = tl.where(key[None, :] == token, 0.0, dS)
        others += tl.sum(dS, 1)
        dtemperature += tl.sum(dS * products, 1)
        dq = tl.dot(dS.to(DOT), k, dq, input_precision="ieee")

    # A query's sum over all of its keys is zero: its own key gets what is left. δ would not say it exactly where that is nearly nothing.
    k = load_rows(k_ptr, past + row0, k_stride_t, k_stride_k, S, k0, K, BM, BK).to(tl.float32)
    dq = (dq - others[:, None] * k) * temperature
    store_rows(dq_ptr + batch * dq_stride_b + head * dq_stride_h, dq, row0, dq_stride_t, dq_stride_k, T, k0, K, BM, BK)
    if k0 == 0:
        own = tl.zeros((BM,), tl.float32)
        for column in tl.range(0, K, BK):
            q_part = load_rows(q_ptr, row0, q_stride_t, q_stride_k, T, column, K, BM, BK).to(tl.float32)
            k_part = load_rows(k_ptr, past + row0, k_stride_t, k_stride_k, S, column, K, BM, BK).to(tl.float32)
            own += tl.sum(q_part * k_part, 1)
        tl.store(delta_ptr + batch_head * T + row, delta, mask=row < T)
        tl.store(others_ptr + batch_head * T + row, others, mask=row < T)
        blocks = tl.cdiv(T, BM)
        tl.store(parts_ptr + (batch * blocks + block) * H + head, tl.sum(dtemperature - others * own, 0))


@triton.jit(do_not_specialize=["T", "S", "window"])
def keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dr_ptr,
    c_ptr,
    temperature_ptr,
    first_ptr,
    end_ptr,
    lse_ptr,
    delta_ptr,
    others_ptr,
    dk_ptr,
    dv_ptr,
    later_ptr,
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
    temperature_stride_h,
    dk_stride_b,
    dk_stride_t,
    dk_stride_h,
    dk_stride_k,
    dv_stride_b,
    dv_stride_t,
    dv_stride_h,
    dv_stride_v,
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
    PARTS: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BN keys of one head, BK columns of dk and BV of dv, over blocks of BM queries from their own to the last that sees one of them.

    PARTS: the more of the blocks of K and of V. Of the fewer the last one is computed again by the programs that are left over.
    """
    # Not tl.cdiv: its result is a tensor's to Triton 3.6, which subtracts nothing from it.
    k_blocks: tl.constexpr = (K + BK - 1) // BK
    v_blocks: tl.constexpr = (V + BV - 1) // BV
    n_blocks = tl.cdiv(S, BN)
    part, batch, head, batch_head = locate(PARTS * n_blocks, H)
    share = part % PARTS
    k0 = tl.minimum(share, k_blocks - 1) * BK
    v0 = tl.minimum(share, v_blocks - 1) * BV
    block = part // PARTS
    n0 = block * BN
    past = S - T
    q_ptr += batch * q_stride_b + head * q_stride_h
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    dr_ptr += batch * dr_stride_b + head * dr_stride_h
    c_ptr += batch_head * S
    lse_ptr += batch_head * T
    delta_ptr += batch_head * T
    others_ptr += batch_head * T
    temperature = tl.load(temperature_ptr + head * temperature_stride_h).to(tl.float32)

    begin = tl.maximum(n0 - past, 0)
    if first_ptr is None:
        end = tl.minimum(n0 + BN - 1 - past + window, T)
    else:
        first_ptr += batch * T
        end = tl.load(end_ptr + batch * n_blocks + block)
    key = n0 + tl.arange(0, BN)
    anchor = tl.load(c_ptr + n0)
    c_key = load_decays(c_ptr, key, anchor, S)
    k = load_rows(k_ptr, n0, k_stride_t, k_stride_k, S, k0, K, BN, BK).to(DOT)
    v = load_rows(v_ptr, n0, v_stride_t, v_stride_v, S, v0, V, BN, BV).to(DOT)
    dk = tl.zeros((BN, BK), tl.float32)
    dv = tl.zeros((BN, BV), tl.float32)
    later = tl.zeros((BN,), tl.float32)
    for row0 in tl.range(begin, end, BM, num_stages=STAGES):
        row = row0 + tl.arange(0, BM)
        q = load_rows(q_ptr, row0, q_stride_t, q_stride_k, T, k0, K, BM, BK).to(DOT)
        dr = load_rows(dr_ptr, row0, dr_stride_t, dr_stride_v, T, v0, V, BM, BV).to(DOT)
        products = inner_products(k, q, k_ptr, q_ptr, n0, row0, k_stride_t, k_stride_k, q_stride_t, q_stride_k, S, T, K, BN, BM, BK, DOT)
        dP = inner_products(v, dr, v_ptr, dr_ptr, n0, row0, v_stride_t, v_stride_v, dr_stride_t, dr_stride_v, S, T, V, BN, BM, BV, DOT)
        first = first_visible(first_ptr, row, past, window, T)
        c_query = load_decays(c_ptr, past + row, anchor, S)
        token = (past + row)[None, :]
        scores = scores_of(products, temperature * LOG2E, c_query[None, :], c_key[:, None], token, first[None, :], key[:, None])
        p = tl.exp2(scores - load_lse(lse_ptr, row, T)[None, :])
        dv = tl.dot(p.to(DOT), dr, dv, input_precision="ieee")
        delta = tl.load(delta_ptr + row, mask=row < T, other=0.0)
        others = tl.load(others_ptr + row, mask=row < T, other=0.0)
        dS = p * (dP - delta[None, :])
        own = key[:, None] == token
        later += tl.sum(tl.where(own, 0.0, dS), 1)
        dS = tl.where(own, -others[None, :], dS)
        dk = tl.dot(dS.to(DOT), q, dk, input_precision="ieee")

    if share < k_blocks:
        store_rows(dk_ptr + batch * dk_stride_b + head * dk_stride_h, dk * temperature, n0, dk_stride_t, dk_stride_k, S, k0, K, BN, BK)
    if share < v_blocks:
        store_rows(dv_ptr + batch * dv_stride_b + head * dv_stride_h, dv, n0, dv_stride_t, dv_stride_v, S, v0, V, BN, BV)
    if share == 0:
        tl.store(later_ptr + batch_head * S + key, later, mask=key < S)
