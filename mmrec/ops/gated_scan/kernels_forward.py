"""Forward kernel of `gated_scan`: a loop over time that runs at the speed of its own arithmetic chain."""

import triton
import triton.language as tl

from mmrec.ops.gated_scan.formula import bounded, decay_and_write, gates_product, sigmoid_of_scaled
from mmrec.ops.primitives import LOG2E


@triton.jit
def advance(h, z, gamma, write, p, w_scaled, begins, HAS_RESET: tl.constexpr, INTERPRETED: tl.constexpr):
    """One token by the formula as it stands."""
    if HAS_RESET:
        gamma = tl.where(begins, 0.0, gamma)
        w_scaled = tl.where(begins, 0.0, w_scaled)
    gate = sigmoid_of_scaled(w_scaled * h - p.to(tl.float32) * LOG2E, INTERPRETED)
    return write * z.to(tl.float32) * gate + gamma * h


@triton.jit
def step(h, z, log_gamma, p, w_scaled, begins, HAS_RESET: tl.constexpr, INTERPRETED: tl.constexpr):
    """The same from a log-decay."""
    gamma, write = decay_and_write(log_gamma.to(tl.float32), INTERPRETED)
    return advance(h, z, gamma, write, p, w_scaled, begins, HAS_RESET, INTERPRETED)


@triton.jit
def decay_of(values, context, biases, bounds, LOGITS: tl.constexpr, HAS_CONTEXT: tl.constexpr, INTERPRETED: tl.constexpr):
    """γ and 1 − γ: of log-decays, or with LOGITS of one or two gates with their scaled `biases`, within `bounds`."""
    if LOGITS:
        gamma, write, _, _ = gates_product(values, biases[0], context, biases[1], HAS_CONTEXT, INTERPRETED)
        return bounded(gamma, write, bounds)
    else:
        return decay_and_write(values.to(tl.float32), INTERPRETED)


@triton.jit
def jacobian(gamma, u, gate, w_scaled):
    """∂h_t/∂h_{t−1} = γ + w u σ′; zero where γ and w are, at a document's first token."""
    return gamma + w_scaled * (-1.0 / LOG2E) * u * gate * (1.0 - gate)


@triton.jit
def rows_of(tile, ROWS: tl.constexpr, BD: tl.constexpr, LEVELS: tl.constexpr):
    """The rows of a tile [ROWS, BD] as a tuple, ROWS = 2^LEVELS; each thread then holds its channels' whole columns in registers."""
    parts = (tl.trans(tile),)
    for level in tl.static_range(LEVELS):
        # Part i holds the rows r ≡ i (mod 2^level), in order.
        evens, odds = (), ()
        for i in tl.static_range(1 << level):
            even, odd = tl.split(tl.reshape(parts[i], [BD, ROWS >> (level + 1), 2]))
            evens = evens + (even,)
            odds = odds + (odd,)
        parts = evens + odds
    rows = ()
    for i in tl.static_range(ROWS):
        rows = rows + (tl.reshape(parts[i], [BD]),)
    return rows


@triton.jit(do_not_specialize=["T", "reset_stride_B"])
def sequential_kernel(
    z_ptr,
    p_ptr,
    decay_ptr,
    w_g_ptr,
    h0_ptr,
    reset_ptr,
    h_ptr,
    h_last_ptr,
    bias_ptr,
    context_ptr,
    context_bias_ptr,
    product_ptr,
    wanted_ptr,
    T,
    D: tl.constexpr,
    group,
    z_stride_B,
    z_stride_T,
    z_stride_D,
    p_stride_B,
    p_stride_T,
    p_stride_D,
    decay_stride_B,
    decay_stride_T,
    decay_stride_D,
    w_g_stride,
    h0_stride_B,
    h0_stride_D,
    reset_stride_B,
    reset_stride_T,
    bias_stride,
    context_stride_B,
    context_stride_T,
    context_stride_D,
    context_bias_stride,
    least,
    greatest,
    least_lost,
    greatest_lost,
    segments,
    BD: tl.constexpr,
    LEVELS: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPED: tl.constexpr,
    HAS_H0: tl.constexpr,
    HAS_RESET: tl.constexpr,
    LOGITS: tl.constexpr,
    HAS_CONTEXT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One program: BD channels of one sequence, in time order, a tile of 2^LEVELS tokens after the other.

    Tiles are copied into shared memory STAGES − 1 ahead. With x = −log2 e · (w h + p) carried beside h a step's chain is fma, ex2, add,
    rcp.
    `decay` holds log γ; with LOGITS the first gate's logits, and `context`, with HAS_CONTEXT, the second's. What γ needs is off the chain.
    `product`, (B, D) fp32, gets ∂h_last/∂h0. A `wanted` that is given, (B / segments, D) int32, says which channels are needed: a program
    without any does nothing. Without `h` only what is left at the end is stored.
    """
    ROWS: tl.constexpr = 1 << LEVELS
    stripes = tl.cdiv(D, BD)
    batch = (tl.program_id(0) // stripes).to(tl.int64)
    if wanted_ptr is not None:
        own = (tl.program_id(0) % stripes) * BD + tl.arange(0, BD)
        if tl.max(tl.load(wanted_ptr + batch // segments * D + own, mask=own < D, other=0)) == 0:
            return
    channel = (tl.program_id(0) % stripes) * BD + tl.arange(0, BD).to(tl.int64)
    inside = channel < D
    row = tl.arange(0, ROWS)[:, None]
    z_row = z_ptr + batch * z_stride_B + channel * z_stride_D
    p_row = p_ptr + batch * p_stride_B + (channel // group) * p_stride_D
    decay_row = decay_ptr + batch * decay_stride_B + channel * decay_stride_D
    if h_ptr is not None:
        h_row = h_ptr + batch * T * D + channel
    if HAS_CONTEXT:
        context_row = context_ptr + batch * context_stride_B + channel * context_stride_D
    if HAS_RESET:
        reset_row = reset_ptr + batch * reset_stride_B

    w_scaled = tl.load(w_g_ptr + channel * w_g_stride, mask=inside, other=0.0).to(tl.float32) * -LOG2E
    biases = (w_scaled, w_scaled)  # of gates that there are not
    bounds = (least, greatest, least_lost, greatest_lost)
    if LOGITS:
        bias = tl.load(bias_ptr + channel * bias_stride, mask=inside, other=0.0).to(tl.float32) * -LOG2E
        biases = (bias, bias)
        if HAS_CONTEXT:
            context_bias = tl.load(context_bias_ptr + channel * context_bias_stride, mask=inside, other=0.0).to(tl.float32) * -LOG2E
            biases = (bias, context_bias)
    h = tl.zeros([BD], tl.float32)
    if HAS_H0:
        h = tl.load(h0_ptr + batch * h0_stride_B + channel * h0_stride_D, mask=inside, other=0.0).to(tl.float32)
    product = tl.full([BD], 1.0, tl.float32)

    whole = T // ROWS * ROWS
    # What cannot be copied asynchronously (single bytes, repeated channels) is loaded into registers one tile ahead.
    if HAS_RESET:
        starts = tl.load(reset_row + tl.arange(0, ROWS) * reset_stride_T, mask=tl.arange(0, ROWS) < whole, other=0)
    if GROUPED:
        p_tile = tl.load(p_row[None, :] + row * p_stride_T, mask=inside[None, :] & (row < whole), other=0.0)
    for start in tl.range(0, whole, ROWS, num_stages=STAGES):
        zs = rows_of(tl.load(z_row[None, :] + row * z_stride_T, mask=inside[None, :], other=0.0), ROWS, BD, LEVELS)
        if GROUPED:
            ps = rows_of(p_tile, ROWS, BD, LEVELS)
            more = inside[None, :] & (row < whole - start - ROWS)
            p_tile = tl.load(p_row[None, :] + (ROWS + row) * p_stride_T, mask=more, other=0.0)
        else:
            ps = rows_of(tl.load(p_row[None, :] + row * p_stride_T, mask=inside[None, :], other=0.0), ROWS, BD, LEVELS)
        decays = rows_of(tl.load(decay_row[None, :] + row * decay_stride_T, mask=inside[None, :], other=0.0), ROWS, BD, LEVELS)
        contexts = decays
        if HAS_CONTEXT:
            context_tile = tl.load(context_row[None, :] + row * context_stride_T, mask=inside[None, :], other=0.0)
            contexts = rows_of(context_tile, ROWS, BD, LEVELS)
        w = w_scaled
        bits = 0
        if HAS_RESET:
            bits = tl.sum((starts != 0).to(tl.int32) << tl.arange(0, ROWS), axis=0)
            reset_row += ROWS * reset_stride_T
            starts = tl.load(reset_row + tl.arange(0, ROWS) * reset_stride_T, mask=tl.arange(0, ROWS) < whole - start - ROWS, other=0)
            w = tl.where(bits & 1 != 0, 0.0, w_scaled)
        x = w * h - ps[0].to(tl.float32) * LOG2E
        for j in tl.static_range(ROWS):
            gamma, write = decay_of(decays[j], contexts[j], biases, bounds, LOGITS, HAS_CONTEXT, INTERPRETED)
            if HAS_RESET:
                gamma = tl.where((bits >> j) & 1 != 0, 0.0, gamma)
            u = write * zs[j].to(tl.float32)
            kept = gamma * h
            gate = sigmoid_of_scaled(x, INTERPRETED)
            if product_ptr is not None:
                product *= jacobian(gamma, u, gate, w)
            if j + 1 < ROWS:
                # What the next token's gate sees, w (u σ + γ h) + p, with everything but σ formed beforehand.
                w = w_scaled
                if HAS_RESET:
                    w = tl.where((bits >> (j + 1)) & 1 != 0, 0.0, w_scaled)
                x = tl.fma(w * u, gate, w * kept - ps[j + 1].to(tl.float32) * LOG2E)
            h = tl.fma(u, gate, kept)
            if h_ptr is not None:
                tl.store(h_row + j * D, h.to(h_ptr.dtype.element_ty), mask=inside)
        if h_ptr is not None:
            h_row += ROWS * D
        z_row += ROWS * z_stride_T
        p_row += ROWS * p_stride_T
        decay_row += ROWS * decay_stride_T
        if HAS_CONTEXT:
            context_row += ROWS * context_stride_T

    for _ in range(whole, T):
        z = tl.load(z_row, mask=inside, other=0.0)
        p = tl.load(p_row, mask=inside, other=0.0)
        decay = tl.load(decay_row, mask=inside, other=0.0)
        context = decay
        if HAS_CONTEXT:
            context = tl.load(context_row, mask=inside, other=0.0)
            context_row += context_stride_T
        begins = False
        if HAS_RESET:
            begins = tl.load(reset_row) != 0
            reset_row += reset_stride_T
        gamma, write = decay_of(decay, context, biases, bounds, LOGITS, HAS_CONTEXT, INTERPRETED)
        if product_ptr is not None:
            gate = sigmoid_of_scaled(w_scaled * h - p.to(tl.float32) * LOG2E, INTERPRETED)
            factor = jacobian(gamma, write * z.to(tl.float32), gate, w_scaled)
            if HAS_RESET:
                factor = tl.where(begins, 0.0, factor)
            product *= factor
        h = advance(h, z, gamma, write, p, w_scaled, begins, HAS_RESET, INTERPRETED)
        if h_ptr is not None:
            tl.store(h_row, h.to(h_ptr.dtype.element_ty), mask=inside)
            h_row += D
        z_row += z_stride_T
        p_row += p_stride_T
        decay_row += decay_stride_T
    tl.store(h_last_ptr + batch * D + channel, h, mask=inside)
    if product_ptr is not None:
        tl.store(product_ptr + batch * D + channel, product, mask=inside)
