"""The Triton kernel of a token's step where a layer has a window: what `kernels.memory_kernel` is for a matrix.

Keys and values come as words of 32 bits as weights do there, and for its reason: all old tokens lie in registers, unopened, before the
kernel waits. Dimension letters: H heads of width K, a window of W tokens.
"""

import triton
import triton.language as tl

from mmrec.decoding.kernels import L2_EPS, begin, opened, read_out, rounded, wait
from mmrec.ops.decay_log.kernels import logsigmoid

LOWEST = tl.constexpr(-1e30)  # finite: a program that sees no token has differences


@triton.jit
def channels(ptr, word, K, round_ptr, PACKED: tl.constexpr):
    """A head's vector in fp32, as precise as what `round_ptr` points to: of every word the even and the odd element, or the one twice."""
    PER: tl.constexpr = 2 if PACKED else 1
    even = rounded(tl.load(ptr + word * PER, mask=word * PER < K, other=0.0), round_ptr)
    odd = even
    if PACKED:
        odd = rounded(tl.load(ptr + word * 2 + 1, mask=word * 2 + 1 < K, other=0.0), round_ptr)
    return even, odd


@triton.jit
def address(ptr, h_even, h_odd, word, K, round_ptr, PACKED: tl.constexpr):
    """`L2norm(x + h)`, rounded as `h` is, in the form of `channels`."""
    even, odd = channels(ptr, word, K, round_ptr, PACKED)
    even += h_even
    odd += h_odd
    squares = even * even
    if PACKED:
        squares += odd * odd
    scale = tl.rsqrt(tl.sum(squares) + L2_EPS)
    return rounded(even * scale, round_ptr), rounded(odd * scale, round_ptr)


@triton.jit
def closed(even, odd, PACKED: tl.constexpr):
    """The words that `opened` opens; of bf16 the elements are exactly such."""
    words = even.to(tl.int32, bitcast=True)
    if PACKED:
        words = ((words >> 16) & 65535) | odd.to(tl.int32, bitcast=True)
    return words


@triton.jit
def merged(parts_ptr, extremes_ptr, channel, K, BK: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr):
    """`r` (BK,) from SPLITS programs' sums over their slots, PARTS at a time; other programs wrote them: not from L1."""
    largest = LOWEST
    total = 0.0
    r = tl.zeros([BK], tl.float32)
    for first in range(0, SPLITS, PARTS):
        index = first + tl.arange(0, PARTS)
        inside = index < SPLITS
        mask = inside[:, None] & (channel[None, :] < K)
        maxima = tl.load(extremes_ptr + index, mask=inside, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(extremes_ptr + SPLITS + index, mask=inside, other=0.0, cache_modifier=".cg")
        sums = tl.load(parts_ptr + index[:, None] * K + channel[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        above = tl.maximum(largest, tl.max(maxima))
        weight = tl.exp(maxima - above)
        kept = tl.exp(largest - above)
        total = kept * total + tl.sum(weight * totals)
        r = kept * r + tl.sum(weight[:, None] * sums, 0)
        largest = above
    return r / total


@triton.jit
def window_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    e_ptr,
    logits_ptr,
    dt_bias_ptr,
    A_log_ptr,
    log_temperature_ptr,
    h_ptr,
    keys_ptr,
    values_ptr,
    log_alpha_ptr,
    decay_ptr,
    position_ptr,
    g_r_ptr,
    g_h_ptr,
    parts_ptr,
    extremes_ptr,
    arrived_ptr,
    y_ptr,
    H,
    K,
    W,
    row,
    parts_stride,
    eps,
    BK: tl.constexpr,
    BW: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    PACKED: tl.constexpr,
    PDL: tl.constexpr,
):
    """A token into its slot of the rings (`rings.Ring`), the window's softmax attention, and the gated read-out `y`, (B, D).

    `r = Σ_j softmax_j(τ ⟨q̃, k̃_j⟩ + Σ_{i>j} log α_i) v_j`. A program takes BN slots of a head; it alone reads and writes them. The last of
    a head's SPLITS programs to arrive, by the head's counter in `arrived_ptr`, merges their sums, makes y, sets the counter back to zero
    and moves the head's position on: by then all have read it.

    Args of note:
        q_ptr, k_ptr, v_ptr, e_ptr: rows of `parts_stride` elements.
        keys_ptr, values_ptr: (B, H, W, row) words.
        parts_ptr: scratch, (B·H, SPLITS, K) fp32: a program's `Σ_j p_j v_j`; with in `extremes_ptr`, (B·H, 2, SPLITS), the largest of its
            scores, to which its p are relative, and `Σ_j p_j`.
    """
    begin(PDL)
    split = tl.program_id(0) % SPLITS
    which = tl.program_id(0) // SPLITS
    head = which % H
    batch = (which // H).to(tl.int64)
    first_slot = which.to(tl.int64) * W
    slot = split * BN + tl.arange(0, BN)
    word = tl.arange(0, BW)[None, :]
    inside = slot < W
    mask = inside[:, None] & (word < row)
    cells = slot[:, None] * row + word
    keys_ptr += first_slot * row
    values_ptr += first_slot * row
    keys = tl.load(keys_ptr + cells, mask=mask, other=0, eviction_policy="evict_first")  # written last by the token before
    values = tl.load(values_ptr + cells, mask=mask, other=0, eviction_policy="evict_first")
    decay = tl.load(decay_ptr + first_slot + slot, mask=inside, other=float("-inf"))
    position = tl.load(position_ptr + which)
    new = slot == position
    rate = tl.exp(tl.load(A_log_ptr + head))
    dt_bias = tl.load(dt_bias_ptr + head)
    temperature = tl.exp(tl.load(log_temperature_ptr + head))
    wait(PDL)
    part = batch * parts_stride + head * K
    own = batch * H * K + head * K
    h_even, h_odd = channels(h_ptr + own, word, K, y_ptr, PACKED)
    q_even, q_odd = address(q_ptr + part, h_even, h_odd, word, K, y_ptr, PACKED)
    k_even, k_odd = address(k_ptr + part, h_even, h_odd, word, K, y_ptr, PACKED)
    v_even, v_odd = channels(v_ptr + part, word, K, y_ptr, PACKED)
    log_alpha = rate * logsigmoid(-(tl.load(logits_ptr + which) + dt_bias))

    keys = tl.where(new[:, None], closed(k_even, k_odd, PACKED), keys)
    values = tl.where(new[:, None], closed(v_even, v_odd, PACKED), values)
    decay = tl.where(new, 0.0, decay + log_alpha)
    tl.store(keys_ptr + cells, keys, mask=mask & new[:, None])
    tl.store(values_ptr + cells, values, mask=mask & new[:, None])
    tl.store(decay_ptr + first_slot + slot, decay, mask=inside)
    tl.store(log_alpha_ptr + first_slot + slot, tl.where(new, log_alpha, 0.0), mask=new)

    key_even, key_odd = opened(keys, PACKED)
    value_even, value_odd = opened(values, PACKED)
    products = key_even * q_even
    if PACKED:
        products += key_odd * q_odd
    scores = temperature * tl.sum(products, 1) + decay
    largest = tl.maximum(tl.max(scores), LOWEST)
    p = tl.exp(scores - largest)  # 0 where nothing is
    weight = p[:, None]
    sums_ptr = parts_ptr + (which.to(tl.int64) * SPLITS + split) * K
    columns = tl.arange(0, BW)
    if PACKED:
        tl.store(sums_ptr + columns * 2, tl.sum(weight * value_even, 0), mask=columns * 2 < K)
        tl.store(sums_ptr + columns * 2 + 1, tl.sum(weight * value_odd, 0), mask=columns * 2 + 1 < K)
    else:
        tl.store(sums_ptr + columns, tl.sum(weight * value_even, 0), mask=columns < K)
    extremes_ptr += which * 2 * SPLITS
    tl.store(extremes_ptr + split, largest)
    tl.store(extremes_ptr + SPLITS + split, tl.sum(p))
    tl.debug_barrier()  # the whole program's sums are on their way, and it has read the position, before its arrival is counted
    last = tl.atomic_add(arrived_ptr + which, 1, sem="acq_rel")
    if last == SPLITS - 1:
        channel = tl.arange(0, BK)
        r = merged(parts_ptr + which.to(tl.int64) * SPLITS * K, extremes_ptr, channel, K, BK, SPLITS, PARTS)
        tl.store(arrived_ptr + which, 0)
        tl.store(position_ptr + which, (position + 1) % W)
        read_out(r, h_ptr + own, e_ptr + part, g_r_ptr + head * K, g_h_ptr + head * K, y_ptr + own, channel, K, eps)
