"""UBÖO's literal loss: the squared distance of what was planned for a token from what came of it, without a shifted copy of either."""

from torch import Tensor

from mmrec.ops.common import check_scan_inputs, check_shape
from mmrec.ops.planning_error.naive import planning_error_naive
from mmrec.ops.planning_error.operator import planning_error_op

__all__ = ["planning_error", "planning_error_naive"]


def planning_error(updated: Tensor, planned: Tensor, first: Tensor | None, counted: Tensor) -> Tensor:
    """`Σ (updated_t − planned_{t−1})²` over the tokens that count and all channels, in fp32.

    Args:
        updated: (B, T, E), `W_planning_error h_t`.
        planned: (B, T, E), `W_planning_target h_t`: what token t plans for the next.
        first: (B, E), what was planned for the first token; None: nothing was, zeros.
        counted: (B, T) boolean.

    Returns:
        0-dim, fp32 (float64 for float64 inputs).

    Raises:
        ValueError: for T = 0 or a wrong shape.
    """
    check_scan_inputs("planning_error", updated, None)
    check_shape("planning_error", "planned", planned, tuple(updated.shape))
    if first is not None:
        check_shape("planning_error", "first", first, (updated.shape[0], updated.shape[2]))
    check_shape("planning_error", "counted", counted, tuple(updated.shape[:2]))
    total: Tensor = planning_error_op(updated, planned, first, counted)
    return total
