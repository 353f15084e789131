"""Backward kernel of `gated_scan`: the adjoint is a linear scan with the Jacobian as its decay, run from the last token to the first."""

import triton
import triton.language as tl

from mmrec.ops.gated_scan.formula import bounded, decay_and_write, gates_product, sigmoid_of_scaled
from mmrec.ops.primitives import LOG2E, last_group, load_starts, maps_before, starts_as_bits


@triton.jit(do_not_specialize=["T", "reset_stride_B"])
def backward_kernel(
    dh_ptr,
    dh_last_ptr,
    h_ptr,
    z_ptr,
    p_ptr,
    decay_ptr,
    w_g_ptr,
    h0_ptr,
    reset_ptr,
    dz_ptr,
    dp_ptr,
    ddecay_ptr,
    dw_g_ptr,
    dh0_ptr,
    bias_ptr,
    context_ptr,
    context_bias_ptr,
    dcontext_ptr,
    dbias_ptr,
    dcontext_bias_ptr,
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
    decay_stride_B,
    decay_stride_T,
    decay_stride_D,
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
    ddecay_stride_B,
    ddecay_stride_T,
    ddecay_stride_D,
    dh0_stride_B,
    dh0_stride_D,
    bias_stride,
    context_stride_B,
    context_stride_T,
    context_stride_D,
    context_bias_stride,
    dcontext_stride_B,
    dcontext_stride_T,
    dcontext_stride_D,
    least,
    greatest,
    least_lost,
    greatest_lost,
    BD: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    STAGES: tl.constexpr,
    SUMMED: tl.constexpr,
    HAS_DH_LAST: tl.constexpr,
    HAS_H0: tl.constexpr,
    HAS_RESET: tl.constexpr,
    LOGITS: tl.constexpr,
    HAS_CONTEXT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One program: BD channels of one sequence, in tiles of R·G tokens; a thread holds G consecutive tokens of its channels.

    Pass 1 folds each group into the map that carries f = J g past it; the groups' maps are scanned; pass 2 runs through each group again
    with the true f. `dp` is summed over SUMMED neighbouring channels, `dw_g` over time.
    `decay` holds log γ; with LOGITS the first gate's logits and `ddecay` gets their gradient, and so do `context` and `dcontext` with
    HAS_CONTEXT; the biases' are summed over time like `dw`.
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
    decay_base = decay_ptr + batch * decay_stride_B + last * decay_stride_T + (column * decay_stride_D)[None, :]
    if HAS_RESET:
        reset_ptr += batch * reset_stride_B
        starts = load_starts(reset_ptr, reset_stride_T, 0, T, R, G, True)
    dz_base = dz_ptr + batch * dz_stride_B + last * dz_stride_T + (column * dz_stride_D)[None, :]
    ddecay_base = ddecay_ptr + batch * ddecay_stride_B + last * ddecay_stride_T + (column * ddecay_stride_D)[None, :]
    if LOGITS:
        bias = tl.load(bias_ptr + channel * bias_stride, mask=channel < D, other=0.0).to(tl.float32)[None, :] * -LOG2E
        context_bias = bias
        dbias = tl.zeros([R, BD], tl.float32)
    if HAS_CONTEXT:
        context_bias = (
            tl.load(context_bias_ptr + channel * context_bias_stride, mask=channel < D, other=0.0).to(tl.float32)[None, :] * -LOG2E
        )
        dcontext_bias = tl.zeros([R, BD], tl.float32)
        context_base = context_ptr + batch * context_stride_B + last * context_stride_T + (column * context_stride_D)[None, :]
        dcontext_base = dcontext_ptr + batch * dcontext_stride_B + last * dcontext_stride_T + (column * dcontext_stride_D)[None, :]
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

    for start in tl.range(0, T, R * G, num_stages=STAGES):
        bits = 0
        if HAS_RESET:
            bits = starts_as_bits(starts, G)
            starts = load_starts(reset_ptr, reset_stride_T, start + R * G, T, R, G, True)
        jacobians, dhs, writes, decays, contexts, slopes, previous = (), (), (), (), (), (), ()
        a = tl.full([R, BD], 1.0, tl.float32)
        f = tl.zeros([R, BD], tl.float32)
        for j in tl.static_range(G):
            s = row + j
            valid = (start + s < T) & inside
            dh = tl.load(dh_base - s * dh_stride_T, mask=valid, other=0.0).to(tl.float32)
            z = tl.load(z_base - s * z_stride_T, mask=valid, other=0.0).to(tl.float32)
            p = tl.load(p_base - s * p_stride_T, mask=valid, other=0.0).to(tl.float32)
            decay = tl.load(decay_base - s * decay_stride_T, mask=valid, other=0.0)
            context = decay
            if HAS_CONTEXT:
                context = tl.load(context_base - s * context_stride_T, mask=valid, other=0.0)
            h = tl.load(h_base - s * h_stride_T, mask=(start + s < T - 1) & inside, other=0.0).to(tl.float32)
            if HAS_H0:
                h = tl.where(start + s == T - 1, initial[None, :], h)
            if LOGITS:
                gamma, write, lost, context_lost = gates_product(decay, bias, context, context_bias, HAS_CONTEXT, INTERPRETED)
                # Each bound where it can be told apart: γ from nothing, 1 − γ from nothing.
                passes = (gamma >= least) & (write >= least_lost)
                gamma, write = bounded(gamma, write, (least, greatest, least_lost, greatest_lost))
            else:
                gamma, write = decay_and_write(decay.to(tl.float32), INTERPRETED)
            begins = (bits >> j) & 1 != 0
            if HAS_RESET:
                h = tl.where(begins, 0.0, h)
            gate = sigmoid_of_scaled((w * h + p) * -LOG2E, INTERPRETED)
            slope = write * z * gate * (1.0 - gate)
            jacobian = gamma + w * slope
            if HAS_RESET:
                jacobian = tl.where(begins, 0.0, jacobian)
            decay_slope = gamma * (h - z * gate)
            if LOGITS:
                # Logits of zeros are no log γ = 0: rows before the first token still have to hand on what arrives.
                jacobian = tl.where(start + s < T, jacobian, 1.0)
                decay_slope = tl.where(passes, decay_slope, 0.0)
                contexts = contexts + (decay_slope * context_lost,)
                decay_slope *= lost
            jacobians = jacobians + (jacobian,)
            dhs = dhs + (dh,)
            writes = writes + (gate * write,)
            decays = decays + (decay_slope,)
            slopes = slopes + (slope,)
            previous = previous + (h,)
            f = jacobian * (dh + f)
            a = jacobian * a
        before_a, before_f = maps_before(a, f)
        f = before_a * carry[None, :] + before_f
        for j in tl.static_range(G):
            s = row + j
            valid = (start + s < T) & inside
            g = dhs[j] + f
            dz = g * writes[j]
            tl.store(dz_base - s * dz_stride_T, dz.to(dz_ptr.dtype.element_ty), mask=valid)
            ddecay = g * decays[j]
            tl.store(ddecay_base - s * ddecay_stride_T, ddecay.to(ddecay_ptr.dtype.element_ty), mask=valid)
            if LOGITS:
                dbias += ddecay
            if HAS_CONTEXT:
                dcontext = g * contexts[j]
                tl.store(dcontext_base - s * dcontext_stride_T, dcontext.to(dcontext_ptr.dtype.element_ty), mask=valid)
                dcontext_bias += dcontext
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
        decay_base -= R * G * decay_stride_T
        if HAS_CONTEXT:
            context_base -= R * G * context_stride_T
            dcontext_base -= R * G * dcontext_stride_T
        dz_base -= R * G * dz_stride_T
        ddecay_base -= R * G * ddecay_stride_T
        dp_base -= R * G * dp_stride_T

    tl.store(dw_g_ptr + batch * D + channel, tl.sum(dw, axis=0), mask=channel < D)
    if LOGITS:
        tl.store(dbias_ptr + batch * D + channel, tl.sum(dbias, axis=0), mask=channel < D)
    if HAS_CONTEXT:
        tl.store(dcontext_bias_ptr + batch * D + channel, tl.sum(dcontext_bias, axis=0), mask=channel < D)
    tl.store(dh0_ptr + batch * dh0_stride_B + channel * dh0_stride_D, carry.to(dh0_ptr.dtype.element_ty), mask=channel < D)
