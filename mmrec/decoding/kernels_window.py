"""The Triton kernel of a token's step where a layer has a window: what `kernels.memory_kernel` is for a matrix.

Keys and values come as words of 32 bits as weights do there, and for its reason: all old tokens lie in registers, unopened, before the
kernel waits. Dimension letters: H heads of width K, a window of W tokens, a convolution of J.
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
def earlier(recent_ptr, gain_ptr, position, stride, back, channel, K, J):
    """What a convolution of a head's vector reads before the token is there, (BJ, BK) each: the tokens, zeros for the new one, and gains.

    Args:
        recent_ptr: the head's channels in the first of J slots, `stride` apart; `position` is the slot that the new token will take.
        gain_ptr: the head's rows of (D, J).
        back: (BJ, 1), how many tokens before the new one; `channel`: (1, BK).
    """
    place = recent_ptr + (position + J - back) % J * stride + channel
    tokens = tl.load(place, mask=(back > 0) & (back < J) & (channel < K), other=0.0)
    gains = tl.load(gain_ptr + channel * J + (J - 1 - back), mask=(back < J) & (channel < K), other=0.0)
    return tokens, gains


@triton.jit
def convolved(x, tokens, gains, back, round_ptr, BW: tl.constexpr, PACKED: tl.constexpr):
    """`Σ_j w_j x_{t−j}` of a token, (1, BK), and what `earlier` found, rounded as `round_ptr` says, in the form of `channels`."""
    products = tl.where(back == 0, x, tokens).to(tl.float32) * gains.to(tl.float32)
    total = rounded(tl.sum(products, 0), round_ptr)
    even = total
    odd = total
    if PACKED:
        even, odd = tl.split(tl.reshape(total, [BW, 2]))
    return even[None, :], odd[None, :]


@triton.jit
def address(even, odd, h_even, h_odd, round_ptr, PACKED: tl.constexpr):
    """`L2norm(x + h)`, rounded as `round_ptr` says, all in the form of `channels`."""
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
    recent_ptr,
    recent_position_ptr,
    q_gain_ptr,
    k_gain_ptr,
    g_r_ptr,
    g_h_ptr,
    parts_ptr,
    extremes_ptr,
    arrived_ptr,
    y_ptr,
    H,
    K,
    W,
    J,
    row,
    parts_stride,
    eps,
    BK: tl.constexpr,
    BW: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    BJ: tl.constexpr,
    PACKED: tl.constexpr,
    PDL: tl.constexpr,
):
    """A token into its slot of the rings (`rings.Ring`), the window's softmax attention, and the gated read-out `y`, (B, D).

    `r = Σ_j softmax_j(τ ⟨q̃, k̃_j⟩ + Σ_{i>j} log α_i) v_j`. A program takes BN slots of a head; it alone reads and writes them. The last of
    a head's SPLITS programs to arrive, by the head's counter in `arrived_ptr`, merges their sums, makes y, sets the counter back to zero
    and moves the head's positions on: by then all have read them.

    Where q and k are convolved every program does that for its head, and one of them keeps the token's: in a slot that none reads now.

    Args of note:
        q_ptr, k_ptr, v_ptr, e_ptr: rows of `parts_stride` elements.
        keys_ptr, values_ptr: (B, H, W, row) words.
        recent_ptr: (B, J, 2D), q and k of the tokens before; with `recent_position_ptr`, (B, H), and the gains, (D, J) each. Or None, all
            four, and J is 1.
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
    if recent_ptr is not None:
        element = tl.arange(0, BW * 2 if PACKED else BW)[None, :]
        back = tl.arange(0, BJ)[:, None]
        stride = 2 * H * K
        recent_ptr += batch * J * stride + head * K
        recent_k_ptr = recent_ptr + H * K
        recent_position = tl.load(recent_position_ptr + which)
        q_tokens, q_gains = earlier(recent_ptr, q_gain_ptr + head * K * J, recent_position, stride, back, element, K, J)
        k_tokens, k_gains = earlier(recent_k_ptr, k_gain_ptr + head * K * J, recent_position, stride, back, element, K, J)
    rate = tl.exp(tl.load(A_log_ptr + head))
    dt_bias = tl.load(dt_bias_ptr + head)
    temperature = tl.exp(tl.load(log_temperature_ptr + head))
    wait(PDL)
    part = batch * parts_stride + head * K
    own = batch * H * K + head * K
    h_even, h_odd = channels(h_ptr + own, word, K, y_ptr, PACKED)
    if recent_ptr is not None:
        q = tl.load(q_ptr + part + element, mask=element < K, other=0.0)
        k = tl.load(k_ptr + part + element, mask=element < K, other=0.0)
        kept = (element < K) & (split == 0)
        tl.store(recent_ptr + recent_position * stride + element, q, mask=kept)
        tl.store(recent_k_ptr + recent_position * stride + element, k, mask=kept)
        q_even, q_odd = convolved(q, q_tokens, q_gains, back, y_ptr, BW, PACKED)
        k_even, k_odd = convolved(k, k_tokens, k_gains, back, y_ptr, BW, PACKED)
    else:
        q_even, q_odd = channels(q_ptr + part, word, K, y_ptr, PACKED)
        k_even, k_odd = channels(k_ptr + part, word, K, y_ptr, PACKED)
    q_even, q_odd = address(q_even, q_odd, h_even, h_odd, y_ptr, PACKED)
    k_even, k_odd = address(k_even, k_odd, h_even, h_odd, y_ptr, PACKED)
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
        if recent_ptr is not None:
            tl.store(recent_position_ptr + which, (recent_position + 1) % J)
        read_out(r, h_ptr + own, e_ptr + part, g_r_ptr + head * K, g_h_ptr + head * K, y_ptr + own, channel, K, eps)
