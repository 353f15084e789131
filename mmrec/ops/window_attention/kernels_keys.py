"""The Triton kernel of `window_attention`'s backward for dk and dv, and what is summed a key (derived in README.md)."""

import triton
import triton.language as tl

from mmrec.ops.memory_scan.kernels import load_rows, locate, store_rows, wide
from mmrec.ops.primitives import LOG2E
from mmrec.ops.window_attention.kernels import first_visible, group_sum, inner_products, load_tile, own_decays, row_pointers


@triton.jit
def _load_numbers(ptr, first, limit, other, N: tl.constexpr, CUT: tl.constexpr):
    """N numbers from `first` on; only those of a CUT tile may reach the limit."""
    index = first + tl.arange(0, N)
    return tl.load(ptr + index, mask=index < limit, other=other) if CUT else tl.load(ptr + index)


@triton.jit
def _block_of_queries(
    dk,
    dv,
    later,
    row0,
    first_ptr,
    k,
    v,
    c_key,
    key,
    anchor,
    whole_begin,
    whole_end,
    temperature,
    q_pointers,
    dr_pointers,
    q_ptr,
    k_ptr,
    v_ptr,
    dr_ptr,
    c_ptr,
    shift_ptr,
    delta_ptr,
    n0,
    k0,
    v0,
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
    window,
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
    """What the queries from `row0` on add to dk and dv, and to the sums of dS over a key's later queries."""
    past = S - T
    q = load_tile(q_pointers, row0, q_stride_t, T, k0, K, BM, BK, CUT).to(DOT)
    dr = load_tile(dr_pointers, row0, dr_stride_t, T, v0, V, BM, BV, CUT).to(DOT)
    shift = _load_numbers(shift_ptr, row0, T, float("-inf"), BM, CUT)
    delta = _load_numbers(delta_ptr, row0, T, 0.0, BM, CUT)
    distance = (group_sum(c_ptr + past, row0, G) - anchor).to(tl.float32)
    products = inner_products(k, q, k_ptr, q_ptr, n0, row0, k_stride_t, k_stride_k, q_stride_t, q_stride_k, S, T, K, BN, BM, BK, DOT)
    dP = inner_products(v, dr, v_ptr, dr_ptr, n0, row0, v_stride_t, v_stride_v, dr_stride_t, dr_stride_v, S, T, V, BN, BM, BV, DOT)
    scores = (products * temperature + shift[None, :]) - (c_key - distance)[:, None]
    if (row0 < whole_begin) | (row0 + BM > whole_end):
        row = row0 + tl.arange(0, BM)
        token = (past + row)[None, :]
        first = first_visible(first_ptr, row, past, window, T)[None, :]
        scores = tl.where((key[:, None] <= token) & (key[:, None] >= first), scores, float("-inf"))
        # A query's own key counts in dv alone: its dS is added last.
        dP = tl.where(key[:, None] == token, delta[None, :], dP)
    p = tl.exp2(scores)
    dv = tl.dot(p.to(DOT), dr, dv, input_precision="ieee")
    dS = p * (dP - delta[None, :])
    return tl.dot(dS.to(DOT), q, dk, input_precision="ieee"), dv, later + tl.sum(dS, 1)


@triton.jit(do_not_specialize=["T", "S", "window"])
def keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dr_ptr,
    c_ptr,
    temperature_ptr,
    first_ptr,
    ends_ptr,
    shift_ptr,
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
    shift_ptr += batch_head * row_stride
    delta_ptr += batch_head * row_stride
    others_ptr += batch_head * T
    temperature = tl.load(temperature_ptr + head * temperature_stride_h).to(tl.float32)

    begin = tl.maximum(n0 - past, 0) // BM * BM
    whole_begin = n0 + BN - past
    if first_ptr is None:
        end = tl.minimum(n0 + BN - 1 - past + window, T)
        whole_end = n0 - past + window
    else:
        first_ptr += batch * T
        ends_ptr += batch * 2 * n_blocks + block
        end = tl.load(ends_ptr)
        whole_end = tl.load(ends_ptr + n_blocks)
    key = n0 + tl.arange(0, BN)
    anchor = group_sum(c_ptr, n0, G)
    c_key = own_decays(c_ptr, key, anchor, S)
    k = load_rows(k_ptr, n0, k_stride_t, k_stride_k, S, k0, K, BN, BK).to(DOT)
    v = load_rows(v_ptr, n0, v_stride_t, v_stride_v, S, v0, V, BN, BV).to(DOT)
    q_pointers = row_pointers(q_ptr, q_stride_t, q_stride_k, k0, BM, BK)
    dr_pointers = row_pointers(dr_ptr, dr_stride_t, dr_stride_v, v0, BM, BV)
    dk = tl.zeros((BN, BK), tl.float32)
    dv = tl.zeros((BN, BV), tl.float32)
    later = tl.zeros((BN,), tl.float32)
    cut = T // BM * BM
    operands = (
        k, v, c_key, key, anchor, whole_begin, whole_end, temperature * LOG2E, q_pointers, dr_pointers, q_ptr, k_ptr, v_ptr, dr_ptr, c_ptr,
        shift_ptr, delta_ptr, n0, k0, v0, q_stride_t, q_stride_k, k_stride_t, k_stride_k, v_stride_t, v_stride_v, dr_stride_t, dr_stride_v,
        T, S, window,
    )  # fmt: skip
    for row0 in tl.range(begin, tl.minimum(end, cut), BM, num_stages=STAGES):
        dk, dv, later = _block_of_queries(dk, dv, later, row0, first_ptr, *operands, K, V, BM, BN, BK, BV, G, DOT, False)
    if end > cut:
        dk, dv, later = _block_of_queries(dk, dv, later, cut, first_ptr, *operands, K, V, BM, BN, BK, BV, G, DOT, True)

    # A query's own key gets what is left of its sum, as in the queries' kernel.
    row = n0 - past + tl.arange(0, BN)
    others = tl.load(others_ptr + row, mask=(row >= 0) & (row < T), other=0.0)
    q_pointers = row_pointers(q_ptr, q_stride_t, q_stride_k, k0, BN, BK) + wide(n0 - past) * q_stride_t
    inside = ((row >= 0) & (row < T))[:, None] & (k0 + tl.arange(0, BK) < K)[None, :]
    dk -= others[:, None] * tl.load(q_pointers, mask=inside, other=0.0).to(tl.float32)
    if share < k_blocks:
        store_rows(dk_ptr + batch * dk_stride_b + head * dk_stride_h, dk * temperature, n0, dk_stride_t, dk_stride_k, S, k0, K, BN, BK)
    if share < v_blocks:
        store_rows(dv_ptr + batch * dv_stride_b + head * dv_stride_h, dv, n0, dv_stride_t, dv_stride_v, S, v0, V, BN, BV)
    if share == 0:
        tl.store(later_ptr + batch_head * S + key, later, mask=key < S)
