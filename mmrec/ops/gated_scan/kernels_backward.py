"""Backward kernel of `gated_scan`: the adjoint is a linear scan with the Jacobian as its decay, run from the last token to the first."""

import triton
import triton.language as tl

from mmrec.ops.gated_scan.formula import decay_and_write, sigmoid_of_scaled
from mmrec.ops.primitives import LOG2E, last_group, load_starts, maps_before, starts_as_bits


@triton.jit(do_not_specialize=["T", "reset_stride_B"])
def backward_kernel(
    dh_ptr,
    dh_last_ptr,
    h_ptr,
    z_ptr,
    p_ptr,
    log_gamma_ptr,
    w_g_ptr,
    h0_ptr,
    reset_ptr,
    dz_ptr,
    dp_ptr,
    dlog_gamma_ptr,
    dw_g_ptr,
    dh0_ptr,
    product_ptr,
    T,
    D,
    group,
    dh_stride_B,
    dh_stride_T,
    dh_stride_D,
    h_stride_B,
    h_stride_T,
    h_stride_D,
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
    dh_last_stride_B,
    dh_last_stride_D,
    h0_stride_B,
    h0_stride_D,
    reset_stride_B,
    reset_stride_T,
    dz_stride_B,
    dz_stride_T,
    dz_stride_D,
    dp_stride_B,
    dp_stride_T,
    dp_stride_D,
    dlog_gamma_stride_B,
    dlog_gamma_stride_T,
    dlog_gamma_stride_D,
    dh0_stride_B,
    dh0_stride_D,
    BD: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    STAGES: tl.constexpr,
    SUMMED: tl.constexpr,
    HAS_DH_LAST: tl.constexpr,
    HAS_H0: tl.constexpr,
    HAS_RESET: tl.constexpr,
    SUMMARY: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One program: BD channels of one sequence, in tiles of R·G tokens; a thread holds G consecutive tokens of its channels.

    Pass 1 folds each group into the map that carries f = J g past it; the groups' maps are scanned; pass 2 runs through each group again
    with the true f. `dp` is summed over SUMMED neighbouring channels, `dw_g` over time.
    SUMMARY: only the map from f behind the last token to f before the first, its offset to `dh0`, its factor to `product`, (B, D) fp32.
    """
    stripes = tl.cdiv(D, BD)
    batch = (tl.program_id(0) // stripes).to(tl.int64)
    stripe = tl.program_id(0) % stripes
    channel = stripe * BD + tl.arange(0, BD)
    column = channel.to(tl.int64)
    inside = (channel < D)[None, :]
    row = tl.arange(0, R)[:, None] * G
    w = tl.load(w_g_ptr + channel * w_g_stride, mask=channel < D, other=0.0).to(tl.float32)[None, :]
    # Time runs backwards: row s of a tile that starts at `start` is token T − 1 − start − s.
    last = T.to(tl.int64) - 1
    dh_base = dh_ptr + batch * dh_stride_B + last * dh_stride_T + (column * dh_stride_D)[None, :]
    h_base = h_ptr + batch * h_stride_B + (last - 1) * h_stride_T + (column * h_stride_D)[None, :]
    z_base = z_ptr + batch * z_stride_B + last * z_stride_T + (column * z_stride_D)[None, :]
    p_base = p_ptr + batch * p_stride_B + last * p_stride_T + ((channel // group).to(tl.int64) * p_stride_D)[None, :]
    log_gamma_base = log_gamma_ptr + batch * log_gamma_stride_B + last * log_gamma_stride_T + (column * log_gamma_stride_D)[None, :]
    if HAS_RESET:
        reset_ptr += batch * reset_stride_B
        starts = load_starts(reset_ptr, reset_stride_T, 0, T, R, G, True)
    dz_base = dz_ptr + batch * dz_stride_B + last * dz_stride_T + (column * dz_stride_D)[None, :]
    dlog_gamma_base = dlog_gamma_ptr + batch * dlog_gamma_stride_B + last * dlog_gamma_stride_T + (column * dlog_gamma_stride_D)[None, :]
    summed = stripe * (BD // SUMMED) + tl.arange(0, BD // SUMMED)
    summed_inside = (summed * SUMMED < D)[None, :]
    dp_base = dp_ptr + batch * dp_stride_B + last * dp_stride_T + (summed.to(tl.int64) * dp_stride_D)[None, :]

    carry = tl.zeros([BD], tl.float32)
    if HAS_DH_LAST:
        carry = tl.load(dh_last_ptr + batch * dh_last_stride_B + channel * dh_last_stride_D, mask=channel < D, other=0.0).to(tl.float32)
    initial = tl.zeros([BD], tl.float32)
    if HAS_H0:
        initial = tl.load(h0_ptr + batch * h0_stride_B + channel * h0_stride_D, mask=channel < D, other=0.0).to(tl.float32)
    dw = tl.zeros([R, BD], tl.float32)
    product = tl.full([BD], 1.0, tl.float32)

    for start in tl.range(0, T, R * G, num_stages=STAGES):
        bits = 0
        if HAS_RESET:
            bits = starts_as_bits(starts, G)
            starts = load_starts(reset_ptr, reset_stride_T, start + R * G, T, R, G, True)
        jacobians, dhs, writes, decays, slopes, previous = (), (), (), (), (), ()
        a = tl.full([R, BD], 1.0, tl.float32)
        f = tl.zeros([R, BD], tl.float32)
        for j in tl.static_range(G):
            s = row + j
            valid = (start + s < T) & inside
            dh = tl.load(dh_base - s * dh_stride_T, mask=valid, other=0.0).to(tl.float32)
            z = tl.load(z_base - s * z_stride_T, mask=valid, other=0.0).to(tl.float32)
            p = tl.load(p_base - s * p_stride_T, mask=valid, other=0.0).to(tl.float32)
            log_gamma = tl.load(log_gamma_base - s * log_gamma_stride_T, mask=valid, other=0.0)
            h = tl.load(h_base - s * h_stride_T, mask=(start + s < T - 1) & inside, other=0.0).to(tl.float32)
            if HAS_H0:
                h = tl.where(start + s == T - 1, initial[None, :], h)
            gamma, write = decay_and_write(log_gamma.to(tl.float32), INTERPRETED)
            begins = (bits >> j) & 1 != 0
            if HAS_RESET:
                h = tl.where(begins, 0.0, h)
            gate = sigmoid_of_scaled((w * h + p) * -LOG2E, INTERPRETED)
            slope = write * z * gate * (1.0 - gate)
            jacobian = gamma + w * slope
            if HAS_RESET:
                jacobian = tl.where(begins, 0.0, jacobian)
            jacobians = jacobians + (jacobian,)
            dhs = dhs + (dh,)
            writes = writes + (gate * write,)
            decays = decays + (gamma * (h - z * gate),)
            slopes = slopes + (slope,)
            previous = previous + (h,)
            f = jacobian * (dh + f)
            a = jacobian * a
        before_a, before_f = maps_before(a, f)
        if SUMMARY:
            product *= last_group(a * before_a, R)
            f = a * (before_a * carry[None, :] + before_f) + f
        else:
            f = before_a * carry[None, :] + before_f
            for j in tl.static_range(G):
                s = row + j
                valid = (start + s < T) & inside
                g = dhs[j] + f
                dz = g * writes[j]
                tl.store(dz_base - s * dz_stride_T, dz.to(dz_ptr.dtype.element_ty), mask=valid)
                dlog_gamma = g * decays[j]
                dlog_gamma_rows = dlog_gamma_base - s * dlog_gamma_stride_T
                tl.store(dlog_gamma_rows, dlog_gamma.to(dlog_gamma_ptr.dtype.element_ty), mask=valid)
                dgate = g * slopes[j]
                dw += dgate * previous[j]
                dp_rows = dp_base - s * dp_stride_T
                if SUMMED == 1:
                    tl.store(dp_rows, dgate.to(dp_ptr.dtype.element_ty), mask=valid)
                else:
                    dp = tl.sum(tl.reshape(dgate, [R, BD // SUMMED, SUMMED]), axis=2)
                    tl.store(dp_rows, dp.to(dp_ptr.dtype.element_ty), mask=(start + s < T) & summed_inside)
                f = jacobians[j] * g
        carry = last_group(f, R)
        dh_base -= R * G * dh_stride_T
        h_base -= R * G * h_stride_T
        z_base -= R * G * z_stride_T
        p_base -= R * G * p_stride_T
        log_gamma_base -= R * G * log_gamma_stride_T
        dz_base -= R * G * dz_stride_T
        dlog_gamma_base -= R * G * dlog_gamma_stride_T
        dp_base -= R * G * dp_stride_T

    if SUMMARY:
        tl.store(product_ptr + batch * D + channel, product, mask=channel < D)
    else:
        tl.store(dw_g_ptr + batch * D + channel, tl.sum(dw, axis=0), mask=channel < D)
    tl.store(dh0_ptr + batch * dh0_stride_B + channel * dh0_stride_D, carry.to(dh0_ptr.dtype.element_ty), mask=channel < D)
