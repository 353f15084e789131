"""`gated_scan` as operators of torch: the functional one with its autograd formula, and a backward into the caller's buffers."""

from typing import Any

import torch
from torch import Tensor

from mmrec.ops.common import state_dtype
from mmrec.ops.gated_scan.pytorch import gated_scan_forward, gated_scan_gradients
from mmrec.ops.registration import register, register_backward, runs_kernel

_INPUTS = "Tensor z, Tensor p, Tensor log_gamma, Tensor w_g, Tensor? h0, Tensor? reset"


def _forward(z: Tensor, p: Tensor, log_gamma: Tensor, w_g: Tensor, h0: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    if not runs_kernel(z, state_dtype(z, p, log_gamma, w_g, h0)):
        return gated_scan_forward(z, p, log_gamma, w_g, h0, reset)
    from mmrec.ops.gated_scan.kernels import launch_forward  # Triton exists on Linux alone

    return launch_forward(z, p, log_gamma, w_g, h0, reset)


def _forward_fake(z: Tensor, p: Tensor, log_gamma: Tensor, w_g: Tensor, h0: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, _, channels = z.shape
    return z.new_empty(z.shape), z.new_empty((batch, channels), dtype=state_dtype(z, p, log_gamma, w_g, h0))


def _backward_out(
    dh: Tensor,
    dh_last: Tensor | None,
    h: Tensor,
    z: Tensor,
    p: Tensor,
    log_gamma: Tensor,
    w_g: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    dz: Tensor,
    dp: Tensor,
    dlog_gamma: Tensor,
    dw_g: Tensor,
    dh0: Tensor,
) -> None:
    gradients = (dz, dp, dlog_gamma, dw_g, dh0)
    if runs_kernel(dh, state_dtype(z, p, log_gamma, w_g, h0)):
        from mmrec.ops.gated_scan.kernels import launch_backward

        launch_backward(dh, dh_last, h, z, p, log_gamma, w_g, h0, reset, *gradients)
        return
    for gradient, value in zip(gradients, gated_scan_gradients(dh, dh_last, h, z, p, log_gamma, w_g, h0, reset), strict=True):
        gradient.copy_(value)


def _backward_fake(
    dh: Tensor,
    dh_last: Tensor | None,
    h: Tensor,
    z: Tensor,
    p: Tensor,
    log_gamma: Tensor,
    w_g: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dh0 = z.new_empty((z.shape[0], z.shape[2]), dtype=state_dtype(z, p, log_gamma, w_g, h0))
    return z.new_empty(z.shape), p.new_empty(p.shape), log_gamma.new_empty(log_gamma.shape), w_g.new_empty(w_g.shape), dh0


def _backward(
    dh: Tensor,
    dh_last: Tensor | None,
    h: Tensor,
    z: Tensor,
    p: Tensor,
    log_gamma: Tensor,
    w_g: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = _backward_fake(dh, dh_last, h, z, p, log_gamma, w_g, h0, reset)
    _backward_out(dh, dh_last, h, z, p, log_gamma, w_g, h0, reset, *gradients)
    return gradients


gated_scan_op = register(f"gated_scan({_INPUTS}) -> (Tensor, Tensor)", _forward, _forward_fake)
gated_scan_bwd = register(
    f"gated_scan_bwd(Tensor dh, Tensor? dh_last, Tensor h, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
gated_scan_bwd_out = register(
    f"gated_scan_bwd_out(Tensor dh, Tensor? dh_last, Tensor h, {_INPUTS}, "
    "Tensor(a!) dz, Tensor(b!) dp, Tensor(c!) dlog_gamma, Tensor(d!) dw_g, Tensor(e!) dh0) -> ()",
    _backward_out,
    lambda *arguments: None,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    # The output stands in for the fp32 states: it enters the Jacobian and dlog_gamma, not the recurrence of the adjoint.
    ctx.save_for_backward(output[0], *inputs)


def _autograd(ctx: Any, dh: Tensor | None, dh_last: Tensor | None) -> tuple[Tensor | None, ...]:
    h, *inputs = ctx.saved_tensors
    dz, dp, dlog_gamma, dw_g, dh0 = gated_scan_bwd(torch.zeros_like(h) if dh is None else dh, dh_last, h, *inputs)
    h0 = inputs[4]
    return dz, dp, dlog_gamma, dw_g, None if h0 is None else dh0.to(h0.dtype), None


register_backward(gated_scan_op, _autograd, _setup_context)
