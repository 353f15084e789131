"""`gated_read_out` as operators of torch: the functional one with its autograd formula, and a backward into the caller's buffers."""

from typing import Any

from torch import Tensor

from mmrec.ops.common import state_dtype
from mmrec.ops.gated_read_out.naive import gated_read_out_naive
from mmrec.ops.gated_read_out.pytorch import gated_read_out_gradients
from mmrec.ops.registration import register, register_backward, runs_kernel


def _forward(r: Tensor, h: Tensor, e: Tensor, g_r: Tensor, g_h: Tensor, eps: float) -> Tensor:
    if runs_kernel(r, state_dtype(r, h, e, g_r, g_h)):
        from mmrec.ops.gated_read_out.kernels import launch_forward  # Triton exists on Linux alone

        return launch_forward(r, h, e, g_r, g_h, eps)
    return gated_read_out_naive(r, h, e, g_r, g_h, eps).contiguous()


def _forward_fake(r: Tensor, h: Tensor, e: Tensor, g_r: Tensor, g_h: Tensor, eps: float) -> Tensor:
    return e.new_empty(e.shape)


def _backward_out(
    dy: Tensor,
    r: Tensor,
    h: Tensor,
    e: Tensor,
    g_r: Tensor,
    g_h: Tensor,
    eps: float,
    dr: Tensor,
    dh: Tensor,
    de: Tensor,
    dg_r: Tensor,
    dg_h: Tensor,
) -> None:
    if runs_kernel(r, state_dtype(r, h, e, g_r, g_h)):
        from mmrec.ops.gated_read_out.kernels import launch_backward

        launch_backward(dy, r, h, e, g_r, g_h, eps, dr, dh, de, dg_r, dg_h)
        return
    for gradient, value in zip((dr, dh, de, dg_r, dg_h), gated_read_out_gradients(dy, r, h, e, g_r, g_h, eps), strict=True):
        gradient.copy_(value)


def _backward_fake(
    dy: Tensor, r: Tensor, h: Tensor, e: Tensor, g_r: Tensor, g_h: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return r.new_empty(r.shape), h.new_empty(h.shape), e.new_empty(e.shape), g_r.new_empty(g_r.shape), g_h.new_empty(g_h.shape)


def _backward(
    dy: Tensor, r: Tensor, h: Tensor, e: Tensor, g_r: Tensor, g_h: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = _backward_fake(dy, r, h, e, g_r, g_h, eps)
    _backward_out(dy, r, h, e, g_r, g_h, eps, *gradients)
    return gradients


gated_read_out_op = register(
    "gated_read_out(Tensor r, Tensor h, Tensor e, Tensor g_r, Tensor g_h, float eps) -> Tensor", _forward, _forward_fake
)
_INPUTS = "Tensor dy, Tensor r, Tensor h, Tensor e, Tensor g_r, Tensor g_h, float eps"
gated_read_out_bwd = register(f"gated_read_out_bwd({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _backward, _backward_fake)
gated_read_out_bwd_out = register(
    f"gated_read_out_bwd_out({_INPUTS}, Tensor(a!) dr, Tensor(b!) dh, Tensor(c!) de, Tensor(d!) dg_r, Tensor(e!) dg_h) -> ()",
    _backward_out,
    lambda *arguments: None,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return (*gated_read_out_bwd(dy, *ctx.saved_tensors, ctx.eps), None)


register_backward(gated_read_out_op, _autograd, _setup_context)
