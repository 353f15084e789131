"""Time-parallel forward kernel of `gated_scan`: Newton's method over a tile of tokens, each iteration one linear scan.

The recurrence is elementwise, so its Jacobian over time is bidiagonal: with F_t(h) = u_t σ(w h + p_t) + γ_t h, and J_t its derivative at
the last iterate ĥ_{t−1}, the next one solves h_t = F_t(ĥ_{t−1}) + J_t (h_{t−1} − ĥ_{t−1}), a linear recurrence. For long sequences of few
channels, where a loop over time leaves the machine idle.
"""

import triton
import triton.language as tl

from mmrec.ops.gated_scan.formula import decay_and_write, sigmoid_of_scaled
from mmrec.ops.gated_scan.kernels_forward import step
from mmrec.ops.primitives import LOG2E, last_group, maps_before

TOLERANCE = tl.constexpr(1e-6)
ROUNDING = tl.constexpr(2.4e-7)  # four units in the last place: what an fp32 step of the linear recurrence may be off by
MAX_ITERATIONS = tl.constexpr(12)


@triton.jit
def evaluate(previous, u, gamma, p_scaled, w_scaled, INTERPRETED: tl.constexpr):
    """F(previous) and the slope u σ′ of its gate."""
    gate = sigmoid_of_scaled(w_scaled * previous + p_scaled, INTERPRETED)
    return tl.fma(u, gate, gamma * previous), u * gate * (1.0 - gate)


@triton.jit
def excess(value, state, u, through, ceiling):
    """By how much the residual |F − h| exceeds what is tolerated; NaN counts as infinite.

    Tolerated is 1e-6 |u| beside rounding, and never more than 1e-6 max(|z|, |h0|) over the tile. Relative to what is written, since over a
    time constant of 1/(1 − γ) tokens residuals add up as what is written does.
    """
    error = tl.abs(value - state)
    allowed = tl.minimum(tl.abs(u) * TOLERANCE + (tl.abs(value) + tl.abs(through)) * ROUNDING, ceiling)
    return tl.where(error == error, error - allowed, float("inf"))


@triton.jit
def solve_linear(decays, inputs, carry, G: tl.constexpr, R: tl.constexpr, BD: tl.constexpr):
    """h_j = a_j h_{j−1} + b_j over a tile that starts from `carry`: all states, and those that enter the groups."""
    a = tl.full([R, BD], 1.0, tl.float32)
    b = tl.zeros([R, BD], tl.float32)
    for j in tl.static_range(G):
        b = decays[j] * b + inputs[j]
        a = decays[j] * a
    before_a, before_b = maps_before(a, b)
    entering = before_a * carry[None, :] + before_b
    h = entering
    states = ()
    for j in tl.static_range(G):
        h = decays[j] * h + inputs[j]
        states = states + (h,)
    return states, entering


@triton.jit(do_not_specialize=["T", "reset_stride_B"])
def newton_kernel(
    z_ptr,
    p_ptr,
    log_gamma_ptr,
    w_g_ptr,
    h0_ptr,
    reset_ptr,
    h_ptr,
    h_last_ptr,
    counts_ptr,
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
    R: tl.constexpr,
    G: tl.constexpr,
    HAS_H0: tl.constexpr,
    HAS_RESET: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One program: BD channels of one sequence in tiles of R·G tokens.

    A tile starts from the linear scan with σ(p), iterates while a residual exceeds what is tolerated, and ends with one application of the
    formula. One that is not finite or has not converged (large |z·w_g|) runs token by token. `counts` gets, a program, the tiles that did
    so and the iterations of all tiles.
    """
    stripes = tl.cdiv(D, BD)
    batch = (tl.program_id(0) // stripes).to(tl.int64)
    channel = (tl.program_id(0) % stripes) * BD + tl.arange(0, BD).to(tl.int64)
    inside_D = channel < D
    inside = inside_D[None, :]
    row = tl.arange(0, R)[:, None] * G
    w_scaled_D = tl.load(w_g_ptr + channel * w_g_stride, mask=inside_D, other=0.0).to(tl.float32) * -LOG2E
    z_base = z_ptr + batch * z_stride_B + channel * z_stride_D
    p_base = p_ptr + batch * p_stride_B + (channel // group) * p_stride_D
    log_gamma_base = log_gamma_ptr + batch * log_gamma_stride_B + channel * log_gamma_stride_D
    h_base = h_ptr + batch * T * D + channel
    if HAS_RESET:
        reset_base = reset_ptr + batch * reset_stride_B

    carry = tl.zeros([BD], tl.float32)
    if HAS_H0:
        carry = tl.load(h0_ptr + batch * h0_stride_B + channel * h0_stride_D, mask=inside_D, other=0.0).to(tl.float32)
    fallen_back = 0
    iterations = 0

    for start in range(0, T, R * G):
        us, gammas, ps, ws, linear = (), (), (), (), ()
        largest = tl.abs(carry)[None, :] + tl.zeros([R, BD], tl.float32)
        for j in tl.static_range(G):
            s = row + j
            valid = (start + s < T) & inside
            z = tl.load(z_base[None, :] + s * z_stride_T, mask=valid, other=0.0).to(tl.float32)
            p = tl.load(p_base[None, :] + s * p_stride_T, mask=valid, other=0.0).to(tl.float32)
            log_gamma = tl.load(log_gamma_base[None, :] + s * log_gamma_stride_T, mask=valid, other=0.0)
            gamma, write = decay_and_write(log_gamma.to(tl.float32), INTERPRETED)
            w = w_scaled_D[None, :]
            if HAS_RESET:
                begins = tl.load(reset_base + s * reset_stride_T, mask=start + s < T, other=0) != 0
                gamma = tl.where(begins, 0.0, gamma)
                w = tl.where(begins, 0.0, w)
            largest = tl.maximum(largest, tl.abs(z))
            u = write * z
            p_scaled = p * -LOG2E
            us = us + (u,)
            gammas = gammas + (gamma,)
            ps = ps + (p_scaled,)
            ws = ws + (w,)
            linear = linear + (u * sigmoid_of_scaled(p_scaled, INTERPRETED),)
        ceiling = tl.max(largest) * TOLERANCE
        states, entering = solve_linear(gammas, linear, carry, G, R, BD)

        beyond = float("inf")
        k = 0
        while (beyond > 0) & (k < MAX_ITERATIONS):
            jacobians, offsets = (), ()
            worst = tl.full([R, BD], float("-inf"), tl.float32)
            previous = entering
            for j in tl.static_range(G):
                value, slope = evaluate(previous, us[j], gammas[j], ps[j], ws[j], INTERPRETED)
                # ws = −log2 e · w_g, zero where a document begins.
                jacobian = gammas[j] + ws[j] * (-1.0 / LOG2E) * slope
                through = jacobian * previous
                jacobians = jacobians + (jacobian,)
                offsets = offsets + (value - through,)
                worst = tl.maximum(worst, excess(value, states[j], us[j], through, ceiling))
                previous = states[j]
            beyond = tl.max(worst)
            if beyond > 0:
                states, entering = solve_linear(jacobians, offsets, carry, G, R, BD)
            k += 1
        iterations += k

        # One plain application ends the iteration, and is itself the last judge of it.
        worst = tl.full([R, BD], float("-inf"), tl.float32)
        previous = entering
        results = ()
        for j in tl.static_range(G):
            value, slope = evaluate(previous, us[j], gammas[j], ps[j], ws[j], INTERPRETED)
            through = (gammas[j] + ws[j] * (-1.0 / LOG2E) * slope) * previous
            worst = tl.maximum(worst, excess(value, states[j], us[j], through, ceiling))
            previous = states[j]
            results = results + (value,)
        if tl.max(worst) <= 0:
            for j in tl.static_range(G):
                s = row + j
                tl.store(h_base[None, :] + s * D, results[j].to(h_ptr.dtype.element_ty), mask=(start + s < T) & inside)
            carry = last_group(results[G - 1], R)
        else:
            fallen_back += 1
            for i in range(0, tl.minimum(T - start, R * G)):
                z_D = tl.load(z_base + i * z_stride_T, mask=inside_D, other=0.0)
                p_D = tl.load(p_base + i * p_stride_T, mask=inside_D, other=0.0)
                log_gamma_D = tl.load(log_gamma_base + i * log_gamma_stride_T, mask=inside_D, other=0.0)
                begins_now = False
                if HAS_RESET:
                    begins_now = tl.load(reset_base + i * reset_stride_T) != 0
                carry = step(carry, z_D, log_gamma_D, p_D, w_scaled_D, begins_now, HAS_RESET, INTERPRETED)
                tl.store(h_base + i * D, carry.to(h_ptr.dtype.element_ty), mask=inside_D)
        z_base += R * G * z_stride_T
        p_base += R * G * p_stride_T
        log_gamma_base += R * G * log_gamma_stride_T
        h_base += R * G * D
        if HAS_RESET:
            reset_base += R * G * reset_stride_T

    tl.store(h_last_ptr + batch * D + channel, carry, mask=inside_D)
    tl.store(counts_ptr + tl.program_id(0) * 2, fallen_back)
    tl.store(counts_ptr + tl.program_id(0) * 2 + 1, iterations)
