"""Forward kernels of `gated_scan`: a loop over time that runs at the speed of its own arithmetic chain."""

import triton
import triton.language as tl

from mmrec.ops.gated_scan.formula import LOG2E, decay_and_write, sigmoid_of_scaled


@triton.jit
def prefetch_rows(row_ptr, row, T, stride_T, BD: tl.constexpr, ROWS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Ask for ROWS rows of BD neighbouring channels from `row` on to be brought into L2, sector by sector; past the end the last one."""
    if not INTERPRETED:
        SECTORS: tl.constexpr = BD * row_ptr.dtype.element_ty.primitive_bitwidth // 256
        sector = tl.arange(0, ROWS * SECTORS)
        rows = tl.minimum(row + sector // SECTORS, T - 1).to(tl.int64)
        addresses = row_ptr + rows * stride_T + (sector % SECTORS) * (BD // SECTORS)
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def step(h, z, log_gamma, p, w_scaled, begins, HAS_RESET: tl.constexpr, INTERPRETED: tl.constexpr):
    """One token by the formula as it stands."""
    gamma, write = decay_and_write(log_gamma.to(tl.float32), INTERPRETED)
    if HAS_RESET:
        gamma = tl.where(begins, 0.0, gamma)
        w_scaled = tl.where(begins, 0.0, w_scaled)
    gate = sigmoid_of_scaled(w_scaled * h - p.to(tl.float32) * LOG2E, INTERPRETED)
    return write * z.to(tl.float32) * gate + gamma * h


@triton.jit(do_not_specialize=["T"])
def sequential_kernel(
    z_ptr,
    p_ptr,
    log_gamma_ptr,
    w_g_ptr,
    h0_ptr,
    reset_ptr,
    h_ptr,
    h_last_ptr,
    T,
    D,
    group,
    z_stride_B,
    z_stride_T,
    z_stride_D,
    p_stride_B,
    p_stride_T,
    p_stride_D,
    log_gamma_stride_B,
    log_gamma_stride_T,
    log_gamma_stride_D,
    w_g_stride,
    h0_stride_B,
    h0_stride_D,
    reset_stride_B,
    reset_stride_T,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
    GROUPED: tl.constexpr,
    HAS_H0: tl.constexpr,
    HAS_RESET: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One program: BD channels of one sequence, in time order.

    A row is asked into L2 AHEAD tokens before its use and loaded into registers ROWS tokens before it, so that a step takes the time of its own chain:
    with x = −log2 e · (w h + p) carried instead of h, that is fma, ex2, add, rcp.
    """
    batch = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BD
    channel = first + tl.arange(0, BD)
    inside = channel < D
    z_base = z_ptr + batch * z_stride_B
    p_base = p_ptr + batch * p_stride_B
    log_gamma_base = log_gamma_ptr + batch * log_gamma_stride_B
    z_row = z_base + channel * z_stride_D
    p_row = p_base + (channel // group) * p_stride_D
    log_gamma_row = log_gamma_base + channel * log_gamma_stride_D
    h_row = h_ptr + batch * T * D + channel
    if HAS_RESET:
        reset_row = reset_ptr + batch * reset_stride_B
    z_base += first * z_stride_D
    p_base += (first // group) * p_stride_D
    log_gamma_base += first * log_gamma_stride_D

    w_scaled = tl.load(w_g_ptr + channel * w_g_stride, mask=inside, other=0.0).to(tl.float32) * -LOG2E
    h = tl.zeros([BD], tl.float32)
    if HAS_H0:
        h = tl.load(h0_ptr + batch * h0_stride_B + channel * h0_stride_D, mask=inside, other=0.0).to(tl.float32)

    whole = T // ROWS * ROWS
    zs, ps, log_gammas, resets = (), (), (), ()
    loaded = inside & (whole > 0)
    for j in tl.static_range(ROWS):
        zs = zs + (tl.load(z_row, mask=loaded, other=0.0),)
        ps = ps + (tl.load(p_row, mask=loaded, other=0.0),)
        log_gammas = log_gammas + (tl.load(log_gamma_row, mask=loaded, other=0.0),)
        z_row += z_stride_T
        p_row += p_stride_T
        log_gamma_row += log_gamma_stride_T
        if HAS_RESET:
            resets = resets + (tl.load(reset_row, mask=whole > 0, other=0) != 0,)
            reset_row += reset_stride_T
    w = w_scaled
    if HAS_RESET:
        w = tl.where(resets[0], 0.0, w_scaled)
    x = w * h - ps[0].to(tl.float32) * LOG2E

    for start in range(0, whole, ROWS):
        prefetch_rows(z_base, start + AHEAD, T, z_stride_T, BD, ROWS, INTERPRETED)
        prefetch_rows(log_gamma_base, start + AHEAD, T, log_gamma_stride_T, BD, ROWS, INTERPRETED)
        if GROUPED:
            prefetch_rows(p_base, start + AHEAD, T, p_stride_T, 32, ROWS, INTERPRETED)
        else:
            prefetch_rows(p_base, start + AHEAD, T, p_stride_T, BD, ROWS, INTERPRETED)
        # The rows of the next tile take the place of those just used.
        more = start + ROWS < whole
        loaded = inside & more
        next_zs, next_ps, next_log_gammas, next_resets = (), (), (), ()
        for j in tl.static_range(ROWS):
            gamma, write = decay_and_write(log_gammas[j].to(tl.float32), INTERPRETED)
            u = write * zs[j].to(tl.float32)
            next_zs = next_zs + (tl.load(z_row, mask=loaded, other=0.0),)
            next_ps = next_ps + (tl.load(p_row, mask=loaded, other=0.0),)
            next_log_gammas = next_log_gammas + (tl.load(log_gamma_row, mask=loaded, other=0.0),)
            z_row += z_stride_T
            p_row += p_stride_T
            log_gamma_row += log_gamma_stride_T
            if HAS_RESET:
                next_resets = next_resets + (tl.load(reset_row, mask=more, other=0) != 0,)
                reset_row += reset_stride_T
                gamma = tl.where(resets[j], 0.0, gamma)
            # What the next token's gate sees: w (u σ + γ h) + p, with everything but σ formed beforehand.
            w = w_scaled
            if j + 1 < ROWS:
                p_next = ps[j + 1]
                if HAS_RESET:
                    w = tl.where(resets[j + 1], 0.0, w_scaled)
            else:
                p_next = next_ps[0]
                if HAS_RESET:
                    w = tl.where(next_resets[0], 0.0, w_scaled)
            kept = gamma * h
            rest = w * kept - p_next.to(tl.float32) * LOG2E
            gate = sigmoid_of_scaled(x, INTERPRETED)
            x = tl.fma(w * u, gate, rest)
            h = tl.fma(u, gate, kept)
            tl.store(h_row, h.to(h_ptr.dtype.element_ty), mask=inside)
            h_row += D
        zs, ps, log_gammas, resets = next_zs, next_ps, next_log_gammas, next_resets

    z_row = z_base + (channel - first) * z_stride_D + whole.to(tl.int64) * z_stride_T
    p_row = p_ptr + batch * p_stride_B + (channel // group) * p_stride_D + whole.to(tl.int64) * p_stride_T
    log_gamma_row = log_gamma_base + (channel - first) * log_gamma_stride_D + whole.to(tl.int64) * log_gamma_stride_T
    if HAS_RESET:
        reset_row = reset_ptr + batch * reset_stride_B + whole.to(tl.int64) * reset_stride_T
    for _ in range(whole, T):
        z = tl.load(z_row, mask=inside, other=0.0)
        p = tl.load(p_row, mask=inside, other=0.0)
        log_gamma = tl.load(log_gamma_row, mask=inside, other=0.0)
        begins = False
        if HAS_RESET:
            begins = tl.load(reset_row) != 0
            reset_row += reset_stride_T
        h = step(h, z, log_gamma, p, w_scaled, begins, HAS_RESET, INTERPRETED)
        tl.store(h_row, h.to(h_ptr.dtype.element_ty), mask=inside)
        z_row += z_stride_T
        p_row += p_stride_T
        log_gamma_row += log_gamma_stride_T
        h_row += D
    tl.store(h_last_ptr + batch * D + channel, h, mask=inside)
