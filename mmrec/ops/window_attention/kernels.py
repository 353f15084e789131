"""The Triton kernel of `window_attention`'s forward, and what the backward's share with it (derived in README.md).

Dimension letters: K and V the widths of a head; a query's token is S − T + its row, as the keys of a state come first. The scores are in
base 2: what enters them is multiplied by log2(e).
"""

import triton
import triton.language as tl

from mmrec.ops.memory_scan.kernels import load_rows, locate, store_rows
from mmrec.ops.primitives import LOG2E


@triton.jit
def first_visible(first_ptr, row, past, window, T):
    """The first key that each query sees: given, or the window's first, which may lie before the first key."""
    return past + row - (window - 1) if first_ptr is None else tl.load(first_ptr + row, mask=row < T, other=0)


@triton.jit
def load_decays(c_ptr, token, anchor, S):
    """Log-decays from the anchor to each token. Subtracted in fp64, as the sums grow with the sequence and only differences count."""
    return ((tl.load(c_ptr + token, mask=token < S, other=0.0) - anchor) * LOG2E).to(tl.float32)


@triton.jit
def scores_of(products, temperature, c_query, c_key, token, first, key):
    """Scores in base 2, −∞ where a query does not see a key; all but `temperature` of two dimensions, whichever of them are the queries."""
    visible = (key <= token) & (key >= first)
    # Masked before the exponential: on the other side of the diagonal it would overflow.
    return tl.where(visible, products * temperature + (c_query - c_key), float("-inf"))


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
def begin_of_keys(first_ptr, row, past, window, BN: tl.constexpr):
    """Where the walk over the keys begins of queries from `row` on: what later ones see begins later."""
    begin = tl.maximum(past + row - (window - 1), 0) if first_ptr is None else tl.load(first_ptr + row)
    return begin // BN * BN


@triton.jit(do_not_specialize=["T", "S", "window"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    c_ptr,
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
    if first_ptr is not None:
        first_ptr += batch * T
    temperature = tl.load(temperature_ptr + head * temperature_stride_h).to(tl.float32) * LOG2E

    row = row0 + tl.arange(0, BM)
    first = first_visible(first_ptr, row, past, window, T)
    anchor = tl.load(c_ptr + past + row0)
    c_query = load_decays(c_ptr, past + row, anchor, S)
    q = load_rows(q_ptr, row0, q_stride_t, q_stride_k, T, 0, K, BM, BK).to(DOT)
    # Finite, so that a query that sees nothing of a block has differences.
    largest = tl.full((BM,), -1e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    r = tl.zeros((BM, BV), tl.float32)
    for n0 in tl.range(begin_of_keys(first_ptr, row0, past, window, BN), tl.minimum(past + row0 + BM, S), BN, num_stages=STAGES):
        key = n0 + tl.arange(0, BN)
        k = load_rows(k_ptr, n0, k_stride_t, k_stride_k, S, 0, K, BN, BK).to(DOT)
        v = load_rows(v_ptr, n0, v_stride_t, v_stride_v, S, v0, V, BN, BV).to(DOT)
        products = inner_products(q, k, q_ptr, k_ptr, row0, n0, q_stride_t, q_stride_k, k_stride_t, k_stride_k, T, S, K, BM, BN, BK, DOT)
        c_key = load_decays(c_ptr, key, anchor, S)
        scores = scores_of(products, temperature, c_query[:, None], c_key[None, :], (past + row)[:, None], first[:, None], key[None, :])
        larger = tl.maximum(largest, tl.max(scores, 1))
        shrunk = tl.exp2(largest - larger)
        p = tl.exp2(scores - larger[:, None])
        total = total * shrunk + tl.sum(p, 1)
        r = tl.dot(p.to(DOT), v, r * shrunk[:, None], input_precision="ieee")
        largest = larger

    r_ptr += batch * r_stride_b + head * r_stride_h
    total = tl.where(row < T, total, 1.0)  # rows past the end may have seen nothing
    store_rows(r_ptr, r / total[:, None], row0, r_stride_t, r_stride_v, T, v0, V, BM, BV)
    if v0 == 0:
        tl.store(lse_ptr + batch_head * T + row, (largest + tl.log2(total)) / LOG2E, mask=row < T)
