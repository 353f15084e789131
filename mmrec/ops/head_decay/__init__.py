"""The long-term memory's decay: a product with a few columns, softplus and a learned rate a head, in fp32, in one pass over the input."""

from torch import Tensor

from mmrec.ops.common import check_scan_inputs, check_shape
from mmrec.ops.head_decay.naive import head_decay_naive
from mmrec.ops.head_decay.operator import head_decay_op

__all__ = ["head_decay", "head_decay_naive"]


def head_decay(x: Tensor, w_alpha: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """`log α = −exp(A_log) · softplus(w_alpha·x + dt_bias)`, one a head (the parametrisation of Mamba-2, arXiv:2405.21060), in fp32.

    Args:
        x: (B, T, D), any float dtype and strides.
        w_alpha: (H, D), fp32, or float64 beside a float64 `x`; in the kernels a product of bf16 numbers keeps 16 bits of it.
        A_log, dt_bias: (H,), fp32 or wider.

    Returns:
        (B, T, H), contiguous, in the dtype of `w_alpha`.

    Raises:
        ValueError: for T = 0 or a wrong shape.
    """
    check_scan_inputs("head_decay", x, None)
    check_shape("head_decay", "w_alpha", w_alpha, (*w_alpha.shape[:1], x.shape[-1]))
    check_shape("head_decay", "A_log", A_log, (w_alpha.shape[0],))
    check_shape("head_decay", "dt_bias", dt_bias, (w_alpha.shape[0],))
    output: Tensor = head_decay_op(x, w_alpha, A_log, dt_bias)[0]
    return output
