"""RMSNorm of the residual stream, and the branch that it opens: one pass forward, one backward that adds the stream's own gradient."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmrec.ops.common import check_scan_inputs, check_shape
from mmrec.ops.registration import INTERPRETED, refuse_second_order
from mmrec.ops.rms_norm.naive import rms_norm_naive
from mmrec.ops.rms_norm.operator import rms_norm_bwd, rms_norm_op, rms_norm_with_copy

__all__ = ["Branch", "rms_norm", "rms_norm_branch", "rms_norm_naive"]


class Branch(NamedTuple):
    """What `rms_norm_branch` returns.

    Attributes:
        normed, again: `rms_norm(x)`, one tensor, for its two readers.
        stream: `x`.
        owned: whether `stream` is a copy of `x` that whoever adds to it may overwrite.
    """

    normed: Tensor
    again: Tensor
    stream: Tensor
    owned: bool


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


def rms_norm_branch(x: Tensor, weight: Tensor, eps: float, overwritten: bool = False) -> Branch:
    """The normed stream twice, for its two readers, and the stream itself: in the backward all three gradients meet in one pass.

    Arguments and errors as `rms_norm`'s.

    Args:
        overwritten: whether who adds to the stream would do so in place. On a GPU the norm, which has `x` in its registers, then writes the
            tensor for it, too: torch's product would copy the stream there first. Not under a compiler, which knows no function that
            overwrites its input.
    """
    _check(x, weight)
    owned = overwritten and (x.is_cuda or INTERPRETED) and not torch.compiler.is_compiling()
    if not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
        normed, stream = rms_norm_with_copy(x, weight, eps) if owned else (rms_norm_op(x, weight, eps), x)
        return Branch(normed, normed, stream, owned)
    normed, again, stream = _Branch.apply(x, weight, eps, owned)
    return Branch(normed, again, stream, owned)


def _check(x: Tensor, weight: Tensor) -> None:
    check_scan_inputs("rms_norm", x, None)
    check_shape("rms_norm", "weight", weight, (x.shape[-1],))


class _Branch(torch.autograd.Function):
    """Autograd would add the gradients of `x` and of both readers one by one, each sum three passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, owned: bool) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        normed, stream = rms_norm_with_copy(x, weight, eps) if owned else (rms_norm_op(x, weight, eps), x.view_as(x))
        return normed, normed.view_as(normed), stream

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dy_more: Tensor | None, dx_more: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_order("rms_norm_branch", "use rms_norm_naive")
        x, weight = ctx.saved_tensors
        if dy is None:
            dy, dy_more = dy_more, None
        if dy is None:
            return dx_more, None, None, None
        dx, dweight = rms_norm_bwd(dy, dy_more, dx_more, x, weight, ctx.eps)
        return dx, dweight, None, None
