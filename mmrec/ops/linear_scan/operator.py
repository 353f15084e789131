"""`linear_scan` as operators of torch: the functional one with its autograd formula, and a backward into the caller's buffers."""

from typing import Any

import torch
from torch import Tensor

from mmrec.ops.common import state_dtype
from mmrec.ops.linear_scan.pytorch import linear_scan_forward, linear_scan_gradients
from mmrec.ops.registration import register, register_backward, runs_kernel


def _forward(x: Tensor, log_a: Tensor, h0: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    if not runs_kernel(x, state_dtype(x, log_a, h0)):
        return linear_scan_forward(x, log_a, h0, reset)
    from mmrec.ops.linear_scan.kernels import launch_forward  # Triton exists on Linux alone

    return launch_forward(x, log_a, h0, reset)


def _forward_fake(x: Tensor, log_a: Tensor, h0: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, _, channels = x.shape
    return x.new_empty(x.shape), x.new_empty((batch, channels), dtype=state_dtype(x, log_a, h0))


def _backward_out(
    dh: Tensor,
    dh_last: Tensor | None,
    h: Tensor,
    log_a: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    dx: Tensor,
    dlog_a: Tensor,
    dh0: Tensor,
) -> None:
    if runs_kernel(dh, state_dtype(dh, log_a, h0)):
        from mmrec.ops.linear_scan.kernels import launch_backward

        launch_backward(dh, dh_last, h, log_a, h0, reset, dx, dlog_a, dh0)
        return
    for gradient, value in zip((dx, dlog_a, dh0), linear_scan_gradients(dh, dh_last, h, log_a, h0, reset), strict=True):
        gradient.copy_(value)


def _backward_fake(
    dh: Tensor, dh_last: Tensor | None, h: Tensor, log_a: Tensor, h0: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, channels = dh.shape
    dh0 = dh.new_empty((batch, channels), dtype=state_dtype(dh, log_a, h0))
    return dh.new_empty(dh.shape), log_a.new_empty(log_a.shape), dh0


def _backward(
    dh: Tensor, dh_last: Tensor | None, h: Tensor, log_a: Tensor, h0: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _backward_fake(dh, dh_last, h, log_a, h0, reset)
    _backward_out(dh, dh_last, h, log_a, h0, reset, *gradients)
    return gradients


linear_scan_op = register("linear_scan(Tensor x, Tensor log_a, Tensor? h0, Tensor? reset) -> (Tensor, Tensor)", _forward, _forward_fake)
linear_scan_bwd = register(
    "linear_scan_bwd(Tensor dh, Tensor? dh_last, Tensor h, Tensor log_a, Tensor? h0, Tensor? reset) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
linear_scan_bwd_out = register(
    "linear_scan_bwd_out(Tensor dh, Tensor? dh_last, Tensor h, Tensor log_a, Tensor? h0, Tensor? reset, "
    "Tensor(a!) dx, Tensor(b!) dlog_a, Tensor(c!) dh0) -> ()",
    _backward_out,
    lambda *arguments: None,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, log_a, h0, reset = inputs
    ctx.set_materialize_grads(False)
    # The output stands in for the fp32 states: rounded to bf16 it moves dlog_a by 2^-9 an element, and x need not be kept.
    ctx.save_for_backward(output[0], log_a, h0, reset)


def _autograd(ctx: Any, dh: Tensor | None, dh_last: Tensor | None) -> tuple[Tensor | None, ...]:
    h, log_a, h0, reset = ctx.saved_tensors
    dx, dlog_a, dh0 = linear_scan_bwd(torch.zeros_like(h) if dh is None else dh, dh_last, h, log_a, h0, reset)
    return dx, dlog_a, None if h0 is None else dh0.to(h0.dtype), None


register_backward(linear_scan_op, _autograd, _setup_context)
