"""RMSNorm of the residual stream, and the branch that it opens: one pass forward, one backward that adds the stream's own gradient."""

from typing import Any

import torch
from torch import Tensor

from mmrec.ops.common import check_scan_inputs, check_shape
from mmrec.ops.registration import refuse_second_order
from mmrec.ops.rms_norm.naive import rms_norm_naive
from mmrec.ops.rms_norm.operator import rms_norm_bwd, rms_norm_op

__all__ = ["rms_norm", "rms_norm_branch", "rms_norm_naive"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x · rsqrt(mean x² + eps) · weight` over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467), in fp32.

    Args:
        x: (B, T, D), any float dtype and strides.
        weight: (D,).
        eps: added to the mean square.

    Returns:
        (B, T, D), contiguous, in the dtype of `x`.

    Raises:
        ValueError: for T = 0 or a wrong shape.
    """
    _check(x, weight)
    output: Tensor = rms_norm_op(x, weight, eps)
    return output


def rms_norm_branch(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normed stream twice, for its two readers, and the stream itself: in the backward all three gradients meet in one pass.

    Arguments and errors as `rms_norm`'s.

    Returns:
        `rms_norm(x)`, the same tensor again, and `x`.
    """
    _check(x, weight)
    if not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
        normed: Tensor = rms_norm_op(x, weight, eps)
        return normed, normed, x
    outputs: tuple[Tensor, Tensor, Tensor] = _Branch.apply(x, weight, eps)
    return outputs


def _check(x: Tensor, weight: Tensor) -> None:
    check_scan_inputs("rms_norm", x, None)
    check_shape("rms_norm", "weight", weight, (x.shape[-1],))


class _Branch(torch.autograd.Function):
    """Autograd would add the gradients of `x` and of both readers one by one, each sum three passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        normed = rms_norm_op(x, weight, eps)
        return normed, normed.view_as(normed), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dy_more: Tensor | None, dx_more: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_order("rms_norm_branch", "use rms_norm_naive")
        x, weight = ctx.saved_tensors
        if dy is None:
            dy, dy_more = dy_more, None
        if dy is None:
            return dx_more, None, None
        dx, dweight = rms_norm_bwd(dy, dy_more, dx_more, x, weight, ctx.eps)
        return dx, dweight, None
