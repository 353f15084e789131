"""Triton kernels of a token's step: a weight matrix is read once, by many small programs, and what surrounds its product runs on the way.

Weights, inputs and gains come as words of 32 bits, (N, K) with K words a row: an fp32 each (`PACKED` false), or two neighbouring bf16,
the even one in the low half. As words a tile travels from one turn of a loop to the next unopened; opened into bf16 it would have to
have arrived, and no load would be in flight while another is used. Sums are fp32.

`PDL` (Hopper's programmatic dependent launch): a kernel starts while the one before still runs, loads its first tile of weights, which no
kernel writes, and only then waits. So the memory is never idle between two kernels. What a kernel reads before the wait must not be
written by any kernel of the same token that comes before it.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mmrec.ops.decay_log.kernels import logsigmoid
from mmrec.ops.gated_read_out.kernels import sigmoid
from mmrec.ops.gated_scan.formula import decay_and_write

L2_EPS = tl.constexpr(1e-6)


@triton.jit
def begin(PDL: tl.constexpr):
    """Let the next kernel start as soon as there is room for it."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Until all that earlier kernels wrote can be read."""
    if PDL:
        gdc_wait()


@triton.jit
def opened(words, PACKED: tl.constexpr):
    """Words as fp32: their even and odd bf16, or the one number twice."""
    if PACKED:
        even = (words << 16).to(tl.float32, bitcast=True)
        odd = (words & -65536).to(tl.float32, bitcast=True)
    else:
        even = words.to(tl.float32, bitcast=True)
        odd = even
    return even, odd


@triton.jit
def rounded(x, ptr):
    """fp32, as precise as what `ptr` points to."""
    return x.to(ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def tile(ptr, row, inside, start, K, BW: tl.constexpr):
    """(R, BW) words of a matrix's rows from word `start` on, zeros past the last; they are read once, so other things may stay in L1."""
    column = start + tl.arange(0, BW)[None, :]
    return tl.load(ptr + row * K + column, mask=inside & (column < K), other=0, eviction_policy="evict_first")


@triton.jit
def piece(ptr, start, K, BW: tl.constexpr):
    """(1, BW) words of a vector: of two dimensions, so that every thread loads what it will multiply."""
    column = start + tl.arange(0, BW)[None, :]
    return tl.load(ptr + column, mask=column < K, other=0)


@triton.jit
def products(
    words, w_ptr, row, inside, x_ptr, norm_ptr, K, x_stride, B: tl.constexpr, R: tl.constexpr, BW: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Rows of a matrix times B vectors, each first multiplied by the gains where there are some.

    Args:
        words: the rows' first tile, (R, BW).
        row, inside: (R, 1), int64 and boolean.

    Returns:
        B sums (R,), and B sums of squares of the vectors, 0-dim.
    """
    partial, squares, xs = (), (), ()
    for b in tl.static_range(B):
        partial = partial + (tl.zeros([R, BW], tl.float32),)
        squares = squares + (tl.zeros([1, BW], tl.float32),)
        xs = xs + (piece(x_ptr + b * x_stride, 0, K, BW),)
    if norm_ptr is not None:
        gains = piece(norm_ptr, 0, K, BW)
    for start in range(0, K, BW):
        words_after = tile(w_ptr, row, inside, start + BW, K, BW)
        xs_after, partial_after, squares_after = (), (), ()
        for b in tl.static_range(B):
            xs_after = xs_after + (piece(x_ptr + b * x_stride, start + BW, K, BW),)
        if norm_ptr is not None:
            gains_after = piece(norm_ptr, start + BW, K, BW)
            gain_even, gain_odd = opened(gains, PACKED)
        w_even, w_odd = opened(words, PACKED)
        for b in tl.static_range(B):
            x_even, x_odd = opened(xs[b], PACKED)
            square, total = squares[b], partial[b]
            if norm_ptr is not None:
                square += x_even * x_even
                if PACKED:
                    square += x_odd * x_odd
                x_even, x_odd = x_even * gain_even, x_odd * gain_odd
            total += w_even * x_even
            if PACKED:
                total += w_odd * x_odd
            partial_after = partial_after + (total,)
            squares_after = squares_after + (square,)
        words, xs, partial, squares = words_after, xs_after, partial_after, squares_after
        if norm_ptr is not None:
            gains = gains_after
    sums, lengths = (), ()
    for b in tl.static_range(B):
        sums = sums + (tl.sum(partial[b], 1),)
        lengths = lengths + (tl.sum(squares[b]),)
    return sums, lengths


@triton.jit
def head_logits(
    x_ptr, norm_ptr, w_ptr, y_ptr, head, H, K, x_stride, eps, B: tl.constexpr, R: tl.constexpr, BW: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Heads' logits `w_α·RMSNorm(x)`, (B, H) fp32; `w_α`, (H, D), is fp32 whatever the rest is."""
    row = head + tl.arange(0, R).to(tl.int64)[:, None]
    inside = row < H
    PER: tl.constexpr = 2 if PACKED else 1
    for b in tl.static_range(B):
        total = tl.zeros([R, BW], tl.float32)
        square = tl.zeros([1, BW], tl.float32)
        for start in range(0, K, BW):
            x_even, x_odd = opened(piece(x_ptr + b * x_stride, start, K, BW), PACKED)
            gain_even, gain_odd = opened(piece(norm_ptr, start, K, BW), PACKED)
            column = start + tl.arange(0, BW)[None, :]
            mask = inside & (column < K)
            even_ptr = w_ptr + (row * K + column) * PER
            total += tl.load(even_ptr, mask=mask, other=0.0) * (x_even * gain_even)
            square += x_even * x_even
            if PACKED:
                total += tl.load(even_ptr + 1, mask=mask, other=0.0) * (x_odd * gain_odd)
                square += x_odd * x_odd
        y = tl.sum(total, 1) * tl.rsqrt(tl.sum(square) / (K * PER) + eps)
        heads = head + tl.arange(0, R)
        tl.store(y_ptr + b * H + heads, y, mask=heads < H)


@triton.jit
def product_kernel(
    x_ptr,
    norm_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    twin_x_ptr,
    twin_w_ptr,
    twin_bias_ptr,
    w_alpha_ptr,
    y_ptr,
    logits_ptr,
    N,
    K,
    H,
    x_stride,
    residual_stride,
    y_stride,
    y_twin,
    eps,
    ACTIVATION: tl.constexpr,
    HEAD_PROGRAMS: tl.constexpr,
    B: tl.constexpr,
    R: tl.constexpr,
    BW: tl.constexpr,
    PACKED: tl.constexpr,
    PDL: tl.constexpr,
):
    """`y = residual + f(W RMSNorm(x) + bias)`, (B, N), of B rows x; a program takes R elements of each.

    The norm is applied behind the product: `W (x g / rms) = W (x g) / rms`, and the programs find rms on their way through x. `x̂` is so
    never rounded, where the ordinary forward rounds it to the weights' dtype.

    Args of note:
        norm_ptr, bias_ptr, residual_ptr: None where there is none.
        twin_...: a second product of the same size, by the programs (·, 1), into `y + y_twin`; or None.
        w_alpha_ptr: (H, D) fp32, for the heads' decay logits into `logits_ptr`, (B, H), by the first HEAD_PROGRAMS programs; or None.
        N: outputs. K: words of a row of W.
        ACTIVATION: "" (none), "gelu", "relu", or "swiglu": then W has 2N rows, all gates before all ups, and `f = SiLU(gate) · up`.
    """
    begin(PDL)
    first = (tl.program_id(0) - HEAD_PROGRAMS).to(tl.int64) * R
    if w_alpha_ptr is not None:
        if first < 0:
            wait(PDL)
            head_logits(x_ptr, norm_ptr, w_alpha_ptr, logits_ptr, tl.program_id(0), H, K, x_stride, eps, B, 1, BW, PACKED)
            first = tl.cast(N, tl.int64)  # and no rows
    if twin_w_ptr is not None:
        if tl.program_id(1) == 1:
            x_ptr = twin_x_ptr
            w_ptr = twin_w_ptr
            bias_ptr = twin_bias_ptr
            y_ptr += y_twin
    if ACTIVATION == "swiglu":  # gates and ups in turn
        ROWS: tl.constexpr = 2 * R
        index = tl.arange(0, ROWS)[:, None]
        row = first + index // 2 + (index % 2) * tl.cast(N, tl.int64)
        inside = first + index // 2 < N
    else:
        ROWS: tl.constexpr = R
        row = first + tl.arange(0, ROWS)[:, None]
        inside = row < N
    words = tile(w_ptr, row, inside, 0, K, BW)
    out = first + tl.arange(0, R)
    mask = out < N
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + out, mask=mask, other=0.0).to(tl.float32)
    wait(PDL)
    residuals = ()
    if residual_ptr is not None:
        for b in tl.static_range(B):
            residuals = residuals + (tl.load(residual_ptr + b * residual_stride + out, mask=mask, other=0.0).to(tl.float32),)
    sums, lengths = products(words, w_ptr, row, inside, x_ptr, norm_ptr, K, x_stride, B, ROWS, BW, PACKED)
    for b in tl.static_range(B):
        y = sums[b]
        if norm_ptr is not None:
            y *= tl.rsqrt(lengths[b] / (K * (2 if PACKED else 1)) + eps)
        if bias_ptr is not None:
            y += bias
        y = rounded(y, y_ptr)
        if ACTIVATION == "gelu":
            y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
        elif ACTIVATION == "relu":
            y = tl.maximum(y, 0.0)
        elif ACTIVATION == "swiglu":
            gate, up = tl.split(tl.reshape(y, [R, 2]))
            y = gate * sigmoid(gate) * up
        if residual_ptr is not None:
            y += residuals[b]
        tl.store(y_ptr + b * y_stride + out, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def short_term_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    context_x_ptr,
    context_w_ptr,
    context_bias_ptr,
    z_ptr,
    p_ptr,
    w_g_ptr,
    h_ptr,
    D,
    K,
    group,
    x_stride,
    parts_stride,
    low,
    high,
    B: tl.constexpr,
    R: tl.constexpr,
    BW: tl.constexpr,
    PACKED: tl.constexpr,
    PDL: tl.constexpr,
):
    """The decay's last layers and the short-term memory: `h = (1 − γ) z σ(w_g h + p̄) + γ h` in place, (B, D) fp32.

    `log γ = clamp(logsigmoid(W x + bias) + logsigmoid(W' x' + bias'))`; without a context (DPG) the first alone. z and p are rows of
    `parts_stride` elements; `group` neighbouring channels share an element of p.
    """
    begin(PDL)
    first = tl.program_id(0).to(tl.int64) * R
    row = first + tl.arange(0, R)[:, None]
    words = tile(w_ptr, row, row < D, 0, K, BW)
    if context_w_ptr is not None:
        context_words = tile(context_w_ptr, row, row < D, 0, K, BW)
    channel = first + tl.arange(0, R)
    mask = channel < D
    bias = tl.load(bias_ptr + channel, mask=mask, other=0.0)
    w_g = tl.load(w_g_ptr + channel, mask=mask, other=0.0)
    wait(PDL)
    parts = ()
    for b in tl.static_range(B):
        z = tl.load(z_ptr + b * parts_stride + channel, mask=mask, other=0.0).to(tl.float32)
        p = tl.load(p_ptr + b * parts_stride + channel // group, mask=mask, other=0.0).to(tl.float32)
        parts = parts + ((z, p, tl.load(h_ptr + b * D + channel, mask=mask, other=0.0)),)
    decays, _ = products(words, w_ptr, row, row < D, x_ptr, None, K, x_stride, B, R, BW, PACKED)
    if context_w_ptr is not None:
        context_bias = tl.load(context_bias_ptr + channel, mask=mask, other=0.0)
        contexts, _ = products(context_words, context_w_ptr, row, row < D, context_x_ptr, None, K, x_stride, B, R, BW, PACKED)
    for b in tl.static_range(B):
        z, p, h = parts[b]
        log_gamma = logsigmoid(rounded(decays[b], z_ptr) + bias)
        if context_w_ptr is not None:
            log_gamma += logsigmoid(rounded(contexts[b], z_ptr) + context_bias)
        gamma, write = decay_and_write(tl.minimum(tl.maximum(log_gamma, low), high), True)
        h = write * z * sigmoid(w_g * h + p) + gamma * h
        tl.store(h_ptr + b * D + channel, h, mask=mask)


@triton.jit
def column(ptr, index, width, round_ptr):
    """(BK, 1) of a head's vector in fp32, as precise as what `round_ptr` points to; zeros past the width."""
    return rounded(tl.load(ptr + index, mask=index < width, other=0.0), round_ptr)


@triton.jit
def l2_normed(x):
    return x * tl.rsqrt(tl.sum(x * x) + L2_EPS)


@triton.jit
def rms_normed(x, width, eps):
    return x * tl.rsqrt(tl.sum(x * x) / width + eps)


@triton.jit
def read_out(r, h_ptr, e_ptr, g_r_ptr, g_h_ptr, y_ptr, channel, width, eps):
    """`y = σ(e) (g_r RMSNorm(r) + g_h RMSNorm(h))` of a head, from `r` in fp32; the pointers are to the head's first elements."""
    inside = channel < width
    h = rounded(tl.load(h_ptr + channel, mask=inside, other=0.0), y_ptr)
    recalled = rms_normed(rounded(r, y_ptr), width, eps) * tl.load(g_r_ptr + channel, mask=inside, other=0.0)
    recent = rms_normed(h, width, eps) * tl.load(g_h_ptr + channel, mask=inside, other=0.0)
    gate = sigmoid(tl.load(e_ptr + channel, mask=inside, other=0.0).to(tl.float32))
    tl.store(y_ptr + channel, (gate * (recalled + recent)).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def memory_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    e_ptr,
    logits_ptr,
    dt_bias_ptr,
    A_log_ptr,
    h_ptr,
    M_ptr,
    g_r_ptr,
    g_h_ptr,
    r_ptr,
    arrived_ptr,
    y_ptr,
    H,
    W,
    parts_stride,
    eps,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SLICES: tl.constexpr,
    PDL: tl.constexpr,
):
    """The long-term memory and the gated read-out of one token: M, (B, H, W, W) fp32, in place, and `y`, (B, D).

    `M = α M + k̃ vᵀ`, `r = Mᵀ q̃`, `y = σ(e) (g_r RMSNorm(r) + g_h RMSNorm(h))`. A program takes BV columns of a head's M. The norm of r
    needs all columns: the last of a head's SLICES programs to arrive, by the head's counter in `arrived_ptr`, makes y and sets the counter
    back to zero. q, k, v and e are rows of `parts_stride` elements; `r_ptr`, (B, D), and the counters, (B·H,) int32, are scratch.
    """
    begin(PDL)
    slice_ = tl.program_id(0) % SLICES
    head = tl.program_id(0) // SLICES % H
    which = tl.program_id(0) // SLICES
    batch = (which // H).to(tl.int64)
    key = tl.arange(0, BK)[:, None]
    value = slice_ * BV + tl.arange(0, BV)[None, :]
    cells = M_ptr + which.to(tl.int64) * W * W + key * W + value
    mask = (key < W) & (value < W)
    M = tl.load(cells, mask=mask, other=0.0)  # written last by the token before
    rate = tl.exp(tl.load(A_log_ptr + head))
    dt_bias = tl.load(dt_bias_ptr + head)
    wait(PDL)
    part = batch * parts_stride + head * W
    own = batch * H * W + head * W
    h = column(h_ptr + own, key, W, y_ptr)
    q = rounded(l2_normed(column(q_ptr + part, key, W, y_ptr) + h), y_ptr)
    k = rounded(l2_normed(column(k_ptr + part, key, W, y_ptr) + h), y_ptr)
    v = tl.load(v_ptr + part + value, mask=value < W, other=0.0).to(tl.float32)
    alpha = tl.exp(rate * logsigmoid(-(tl.load(logits_ptr + which) + dt_bias)))
    M = alpha * M + k * v
    tl.store(cells, M, mask=mask)
    r = tl.sum(M * q, 0)
    channel = tl.arange(0, BK)
    inside = channel < W
    last = 0
    if SLICES > 1:
        columns = slice_ * BV + tl.arange(0, BV)
        tl.store(r_ptr + own + columns, r, mask=columns < W)
        tl.debug_barrier()  # the whole program's part of r is on its way before its arrival is counted
        last = tl.atomic_add(arrived_ptr + which, 1, sem="acq_rel")
    if last == SLICES - 1:
        if SLICES > 1:
            whole_r = tl.load(r_ptr + own + channel, mask=inside, other=0.0, cache_modifier=".cg")  # other programs' too: not from L1
            tl.store(arrived_ptr + which, 0)
        else:
            whole_r = r
        read_out(whole_r, h_ptr + own, e_ptr + part, g_r_ptr + head * W, g_h_ptr + head * W, y_ptr + own, channel, W, eps)
