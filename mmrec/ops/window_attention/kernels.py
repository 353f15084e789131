"""The Triton kernel of `window_attention`'s forward, and what the backward's share with it (derived in README.md).

Dimension letters: K and V the widths of a head; a query's token is S − T + its row, as the keys of a state come first. The scores are in
base 2: what enters them is multiplied by log2(e).
"""

import triton
import triton.language as tl

from mmrec.ops.memory_scan.kernels import load_rows, locate, store_rows, wide
from mmrec.ops.primitives import LOG2E


@triton.jit
def first_visible(first_ptr, row, past, window, T):
    """The first key that each query sees: given, or the window's first, which may lie before the first key."""
    return past + row - (window - 1) if first_ptr is None else tl.load(first_ptr + row, mask=row < T, other=0)


@triton.jit
def group_sum(c_ptr, token, G: tl.constexpr):
    """The float64 sum at the first token of a token's group, where the group's fp32 ones begin. A tile lies within one."""
    return tl.load(c_ptr + token // G * G)


@triton.jit
def own_decays(c_ptr, token, anchor, S):
    """Log-decays from the anchor to each query of a program. Subtracted in float64: the sums grow, and only their differences count."""
    return (tl.load(c_ptr + token, mask=token < S, other=0.0) - anchor).to(tl.float32)


@triton.jit
def row_pointers(ptr, stride_row, stride_column, column0, R: tl.constexpr, W: tl.constexpr):
    """Where a matrix's first R rows lie, from column `column0` on."""
    columns = column0 + tl.arange(0, W).to(tl.int64)
    return ptr + tl.arange(0, R).to(tl.int64)[:, None] * stride_row + columns[None, :] * stride_column


@triton.jit
def load_tile(pointers, row0, stride_row, limit, column0, WIDTH: tl.constexpr, R: tl.constexpr, W: tl.constexpr, CUT: tl.constexpr):
    """(R, W) elements from row `row0` on, zeros outside; only those of a CUT tile may reach the limit of the rows."""
    pointers += wide(row0) * stride_row
    inside = (column0 + tl.arange(0, W) < WIDTH)[None, :]
    if CUT:
        tile = tl.load(pointers, mask=inside & (row0 + tl.arange(0, R) < limit)[:, None], other=0.0)
    elif WIDTH % W:
        tile = tl.load(pointers, mask=inside, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def inner_products(
    a,
    b,
    a_ptr,
    b_ptr,
    a_first,
    b_first,
    a_stride_row,
    a_stride_column,
    b_stride_row,
    b_stride_column,
    a_limit,
    b_limit,
    WIDTH: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    W: tl.constexpr,
    DOT: tl.constexpr,
):
    """(A, B) of rows of two matrices (…, WIDTH). `a` and `b` are their tiles where W covers the width, and otherwise not looked at."""
    if WIDTH <= W:
        products = tl.dot(a, tl.trans(b), input_precision="ieee")
    else:
        products = tl.zeros((A, B), tl.float32)
        for column in tl.range(0, WIDTH, W):
            a_part = load_rows(a_ptr, a_first, a_stride_row, a_stride_column, a_limit, column, WIDTH, A, W).to(DOT)
            b_part = load_rows(b_ptr, b_first, b_stride_row, b_stride_column, b_limit, column, WIDTH, B, W).to(DOT)
            products = tl.dot(a_part, tl.trans(b_part), products, input_precision="ieee")
    return products


@triton.jit
def walk_over_keys(first_ptr, row0, past, window, T, S, BM: tl.constexpr, BN: tl.constexpr):
    """Of the queries from `row0` on: the first block of keys that one of them sees, the end of their own, and where what all see begins.

    What later queries see begins later.
    """
    if first_ptr is None:
        begin = tl.maximum(past + row0 - (window - 1), 0)
        seen_by_all = past + row0 + BM - window
    else:
        begin = tl.load(first_ptr + row0)
        seen_by_all = tl.load(first_ptr + tl.minimum(row0 + BM, T) - 1)
    return begin // BN * BN, tl.minimum(past + row0 + BM, S), seen_by_all


@triton.jit
def _read_block(
    largest,
    total,
    r,
    n0,
    q,
    c_query,
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
    c_ptr,
    local_ptr,
    row0,
    q_stride_t,
    q_stride_k,
    k_stride_t,
    k_stride_k,
    v_stride_t,
    v0,
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
    """A step of the online softmax over the keys from `n0` on: the largest scores so far, the sums of weights and the read-out."""
    k = load_tile(k_pointers, n0, k_stride_t, S, 0, K, BN, BK, CUT).to(DOT)
    v = load_tile(v_pointers, n0, v_stride_t, S, v0, V, BN, BV, CUT).to(DOT)
    c_key = tl.load(local_ptr + n0 + tl.arange(0, BN))
    distance = (group_sum(c_ptr, n0, G) - anchor).to(tl.float32)
    products = inner_products(q, k, q_ptr, k_ptr, row0, n0, q_stride_t, q_stride_k, k_stride_t, k_stride_k, T, S, K, BM, BN, BK, DOT)
    # What a query's scores have in common, its own decay, waits for the exponent.
    scores = products * temperature - c_key[None, :]
    shift = c_query - distance
    if (n0 < whole_begin) | (n0 + BN > whole_end):
        key = n0 + tl.arange(0, BN)
        visible = (key[None, :] <= token[:, None]) & (key[None, :] >= first[:, None])
        # Masked before the exponential: on the other side of the diagonal it would overflow.
        scores = tl.where(visible, products * temperature + (shift[:, None] - c_key[None, :]), float("-inf"))
        shift = tl.zeros((BM,), tl.float32)
    larger = tl.maximum(largest, tl.max(scores, 1) + shift)
    shrunk = tl.exp2(largest - larger)
    p = tl.exp2(scores + (shift - larger)[:, None])
    return larger, total * shrunk + tl.sum(p, 1), tl.dot(p.to(DOT), v, r * shrunk[:, None], input_precision="ieee")


@triton.jit(do_not_specialize=["T", "S", "window"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    c_ptr,
    local_ptr,
    temperature_ptr,
    first_ptr,
    r_ptr,
    lse_ptr,
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
    temperature_stride_h,
    r_stride_b,
    r_stride_t,
    r_stride_h,
    r_stride_v,
    local_stride,
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
    """BM queries of one head, BV columns of r, over blocks of BN keys from the first that one of them sees to their own."""
    v_blocks: tl.constexpr = tl.cdiv(V, BV)
    part, batch, head, batch_head = locate(v_blocks * tl.cdiv(T, BM), H)
    v0 = (part % v_blocks) * BV
    row0 = (part // v_blocks) * BM
    past = S - T
    q_ptr += batch * q_stride_b + head * q_stride_h
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    c_ptr += batch_head * S
    local_ptr += batch_head * local_stride
    if first_ptr is not None:
        first_ptr += batch * T
    temperature = tl.load(temperature_ptr + head * temperature_stride_h).to(tl.float32) * LOG2E

    row = row0 + tl.arange(0, BM)
    token = past + row
    first = first_visible(first_ptr, row, past, window, T)
    anchor = group_sum(c_ptr, past + row0, G)
    c_query = own_decays(c_ptr, token, anchor, S)
    q = load_rows(q_ptr, row0, q_stride_t, q_stride_k, T, 0, K, BM, BK).to(DOT)
    k_pointers = row_pointers(k_ptr, k_stride_t, k_stride_k, 0, BN, BK)
    v_pointers = row_pointers(v_ptr, v_stride_t, v_stride_v, v0, BN, BV)
    begin, end, whole_begin = walk_over_keys(first_ptr, row0, past, window, T, S, BM, BN)
    whole_end = past + row0 + 1
    # Finite, so that a query that sees nothing of a block has differences.
    largest = tl.full((BM,), -1e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    r = tl.zeros((BM, BV), tl.float32)
    cut = S // BN * BN
    operands = (
        q, c_query, token, first, anchor, whole_begin, whole_end, temperature, k_pointers, v_pointers, q_ptr, k_ptr, c_ptr, local_ptr,
        row0, q_stride_t, q_stride_k, k_stride_t, k_stride_k, v_stride_t, v0, T, S,
    )  # fmt: skip
    for n0 in tl.range(begin, tl.minimum(end, cut), BN, num_stages=STAGES):
        largest, total, r = _read_block(largest, total, r, n0, *operands, K, V, BM, BN, BK, BV, G, DOT, False)
    if end > cut:
        largest, total, r = _read_block(largest, total, r, cut, *operands, K, V, BM, BN, BK, BV, G, DOT, True)

    r_ptr += batch * r_stride_b + head * r_stride_h
    total = tl.where(row < T, total, 1.0)  # rows past the end may have seen nothing
    store_rows(r_ptr, r * (1.0 / total)[:, None], row0, r_stride_t, r_stride_v, T, v0, V, BM, BV)
    if v0 == 0:
        tl.store(lse_ptr + batch_head * T + row, (largest + tl.log2(total)) / LOG2E, mask=row < T)
