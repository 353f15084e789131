"""The core formula's parts as Triton functions, shared by the forward and backward kernels."""

import triton
import triton.language as tl

from mmrec.ops.primitives import LOG2E


@triton.jit
def exp2_fast(x, INTERPRETED: tl.constexpr):
    """2^x by the hardware's ex2 (2 ulp), denormals flushed: two instructions less in the chain of a time step."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(x, INTERPRETED: tl.constexpr):
    """1 / x by the hardware's rcp (1 ulp); 0 for x = inf."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def decay_and_write(log_gamma, INTERPRETED: tl.constexpr):
    """γ and 1 − γ of fp32 log-decays ≤ 0, both to 1e-6 relative.

    1 − γ = −expm1(log γ): the difference of two numbers near 1 keeps few digits, so small logs take the series instead.
    """
    gamma = exp2_fast(log_gamma * LOG2E, INTERPRETED)
    series = 1.0 / 720
    series = series * log_gamma + 1.0 / 120
    series = series * log_gamma + 1.0 / 24
    series = series * log_gamma + 1.0 / 6
    series = series * log_gamma + 0.5
    series = series * log_gamma + 1.0
    return gamma, tl.where(log_gamma > -0.25, -log_gamma * series, 1.0 - gamma)


@triton.jit
def gates_product(logits, bias_scaled, context, context_bias_scaled, HAS_CONTEXT: tl.constexpr, INTERPRETED: tl.constexpr):
    """γ = σ(a) σ(b), 1 − γ, 1 − σ(a) and 1 − σ(b) of a = logits + bias and b = context + context_bias, each to a few ulp.

    With e = e^−a and f = e^−b all four are products and sums of positive terms: γ = 1 / ((1 + e)(1 + f)), 1 − γ = (e + f (1 + e)) γ,
    1 − σ(a) = e (1 + f) γ, 1 − σ(b) = f (1 + e) γ. Below 2^−63 a gate stays there, so that no product is infinite.

    Args:
        logits, context: without HAS_CONTEXT the latter is not looked at, γ = σ(a), and the last result is none of use.
        bias_scaled, context_bias_scaled: the biases times −log2 e, fp32.
    """
    e = exp2_fast(tl.minimum(logits.to(tl.float32) * -LOG2E + bias_scaled, 63.0, tl.PropagateNan.ALL), INTERPRETED)
    if not HAS_CONTEXT:
        gamma = reciprocal(1.0 + e, INTERPRETED)
        lost = e * gamma
        return gamma, lost, lost, lost
    f = exp2_fast(tl.minimum(context.to(tl.float32) * -LOG2E + context_bias_scaled, 63.0, tl.PropagateNan.ALL), INTERPRETED)
    gamma = reciprocal((1.0 + e) * (1.0 + f), INTERPRETED)
    of_context = (1.0 + e) * f
    return gamma, (of_context + e) * gamma, (1.0 + f) * e * gamma, of_context * gamma


@triton.jit
def bounded(gamma, write, bounds):
    """γ and 1 − γ within `bounds`, (least γ, greatest γ, least 1 − γ, greatest 1 − γ): each has digits where the other has none."""
    gamma = tl.minimum(tl.maximum(gamma, bounds[0], tl.PropagateNan.ALL), bounds[1], tl.PropagateNan.ALL)
    write = tl.minimum(tl.maximum(write, bounds[2], tl.PropagateNan.ALL), bounds[3], tl.PropagateNan.ALL)
    return gamma, write


@triton.jit
def sigmoid_of_scaled(x, INTERPRETED: tl.constexpr):
    """σ(y) for x = −y·log2 e: the factor is folded into what forms y, so that a step's chain is fma, ex2, add, rcp, fma."""
    return reciprocal(1.0 + exp2_fast(x, INTERPRETED), INTERPRETED)
