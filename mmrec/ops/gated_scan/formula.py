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
def sigmoid_of_scaled(x, INTERPRETED: tl.constexpr):
    """σ(y) for x = −y·log2 e: the factor is folded into what forms y, so that a step's chain is fma, ex2, add, rcp, fma."""
    return reciprocal(1.0 + exp2_fast(x, INTERPRETED), INTERPRETED)
