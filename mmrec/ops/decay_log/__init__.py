"""Decays of the short-term memory in the log domain, from logits."""

from torch import Tensor

from mmrec.ops.common import check_scan_inputs, check_shape
from mmrec.ops.decay_log.naive import decay_log_naive
from mmrec.ops.decay_log.operator import decay_log_op

__all__ = ["decay_log", "decay_log_naive"]


def decay_log(
    logits: Tensor,
    bias: Tensor,
    context: Tensor | None = None,
    context_bias: Tensor | None = None,
    *,
    low: float,
    high: float,
) -> Tensor:
    """`log γ = log σ(logits + bias) + log σ(context + context_bias)`, clamped to `[low, high]`; without a context its term is 0.

    Args:
        logits, context: (B, T, D), any float dtype and strides.
        bias, context_bias: (D,) fp32, contiguous.
        low, high: bounds of the result; beyond them no gradient passes.

    Returns:
        (B, T, D), contiguous, in fp32 (float64 for float64 inputs).

    Raises:
        ValueError: for T = 0, a wrong shape, or a context without its bias.
    """
    check_scan_inputs("decay_log", logits, None)
    check_shape("decay_log", "bias", bias, (logits.shape[2],))
    if (context is None) != (context_bias is None):
        raise ValueError("decay_log: context and context_bias come together; give both or neither")
    if context is not None and context_bias is not None:
        check_shape("decay_log", "context", context, tuple(logits.shape))
        check_shape("decay_log", "context_bias", context_bias, (logits.shape[2],))
    output: Tensor = decay_log_op(logits, bias, context, context_bias, low, high)
    return output
