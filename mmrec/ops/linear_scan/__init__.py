"""The linear recurrence with a decay per channel."""

from torch import Tensor

from mmrec.ops.common import check_scan_inputs, check_shape
from mmrec.ops.linear_scan.naive import linear_scan_naive
from mmrec.ops.linear_scan.operator import linear_scan_op

__all__ = ["linear_scan", "linear_scan_naive"]


def linear_scan(x: Tensor, log_a: Tensor, h0: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`h_t = a_t h_{t-1} + x_t`.

    Args:
        x: (B, T, D), any float dtype.
        log_a: (B, T, D), log-decays ≤ 0, fp32 or bf16.
        h0: (B, D) fp32, the state before the first token; None means zero.
        reset: (B, T) boolean; where true the state is zero before the token enters.

    Returns:
        `h` (B, T, D) in the dtype of `x`, and `h_last` (B, D) in fp32 (float64 for float64 inputs).

    Raises:
        ValueError: for T = 0 or a wrong shape.
    """
    check_scan_inputs("linear_scan", x, reset)
    check_shape("linear_scan", "log_a", log_a, tuple(x.shape))
    if h0 is not None:
        check_shape("linear_scan", "h0", h0, (x.shape[0], x.shape[2]))
    output: tuple[Tensor, Tensor] = linear_scan_op(x, log_a, h0, reset)
    return output
