"""The cumulative product of decays, summed in the log domain."""

import torch
from torch import Tensor

from mmrec.ops.common import check_scan_inputs, check_shape
from mmrec.ops.exp_product_scan.naive import exp_product_scan_naive
from mmrec.ops.exp_product_scan.operator import exp_product_scan_op

__all__ = ["exp_product_scan", "exp_product_scan_naive"]


def exp_product_scan(log_gamma: Tensor, y0: Tensor | None = None, *, accum_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """`Y_t = y0 · ∏_{i≤t} γ_i`, the associative scan of exponential products.

    Args:
        log_gamma: (B, T, D), log-decays ≤ 0, fp32 or bf16 (float64 in tests).
        y0: (B, D), the value before the first token; None means 1.
        accum_dtype: in which dtype the logs are summed, float32 or float64.

    Returns:
        `Y` (B, T, D) in the dtype of `log_gamma`, and `y_last` (B, D) in fp32 (float64 for float64 inputs).

    Raises:
        ValueError: for T = 0, a wrong shape or another `accum_dtype`.
    """
    check_scan_inputs("exp_product_scan", log_gamma, None)
    if y0 is not None:
        check_shape("exp_product_scan", "y0", y0, (log_gamma.shape[0], log_gamma.shape[2]))
    if accum_dtype not in (torch.float32, torch.float64):
        raise ValueError(f"exp_product_scan: accum_dtype is {accum_dtype}; use torch.float32 or torch.float64")
    output: tuple[Tensor, Tensor] = exp_product_scan_op(log_gamma, y0, accum_dtype)
    return output
