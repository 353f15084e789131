"""`exp_product_scan` as operators of torch: the functional one with its autograd formula, and a backward into the caller's buffers."""

from typing import Any

import torch
from torch import Tensor

from mmrec.ops.common import state_dtype
from mmrec.ops.exp_product_scan.pytorch import exp_product_scan_forward, exp_product_scan_gradients
from mmrec.ops.registration import register, register_backward, runs_kernel


def _forward(log_gamma: Tensor, y0: Tensor | None, accum_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if not runs_kernel(log_gamma, state_dtype(log_gamma, y0)):
        return exp_product_scan_forward(log_gamma, y0, accum_dtype)
    from mmrec.ops.exp_product_scan.kernels import launch_forward  # Triton exists on Linux alone

    return launch_forward(log_gamma, y0, accum_dtype)


def _forward_fake(log_gamma: Tensor, y0: Tensor | None, accum_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, _, channels = log_gamma.shape
    return log_gamma.new_empty(log_gamma.shape), log_gamma.new_empty((batch, channels), dtype=state_dtype(log_gamma, y0))


def _backward_out(
    dy: Tensor,
    dy_last: Tensor | None,
    y: Tensor,
    y_last: Tensor,
    log_gamma: Tensor | None,
    accum_dtype: torch.dtype,
    dlog_gamma: Tensor,
    dy0: Tensor | None,
) -> None:
    if runs_kernel(dy, y_last.dtype):
        from mmrec.ops.exp_product_scan.kernels import launch_backward

        launch_backward(dy, dy_last, y, y_last, log_gamma, accum_dtype, dlog_gamma, dy0)
        return
    to_log_gamma, to_y0 = exp_product_scan_gradients(dy, dy_last, y, y_last, log_gamma, accum_dtype)
    dlog_gamma.copy_(to_log_gamma)
    if dy0 is not None and to_y0 is not None:
        dy0.copy_(to_y0)


def _backward_fake(
    dy: Tensor, dy_last: Tensor | None, y: Tensor, y_last: Tensor, log_gamma: Tensor | None, accum_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    batch, _, channels = dy.shape
    rows = 0 if log_gamma is None else batch  # an operator returns tensors: no y0, no rows
    return y.new_empty(y.shape), y_last.new_empty((rows, channels))


def _backward(
    dy: Tensor, dy_last: Tensor | None, y: Tensor, y_last: Tensor, log_gamma: Tensor | None, accum_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    dlog_gamma, dy0 = _backward_fake(dy, dy_last, y, y_last, log_gamma, accum_dtype)
    _backward_out(dy, dy_last, y, y_last, log_gamma, accum_dtype, dlog_gamma, None if log_gamma is None else dy0)
    return dlog_gamma, dy0


exp_product_scan_op = register(
    "exp_product_scan(Tensor log_gamma, Tensor? y0, ScalarType accum_dtype) -> (Tensor, Tensor)", _forward, _forward_fake
)
exp_product_scan_bwd = register(
    "exp_product_scan_bwd(Tensor dy, Tensor? dy_last, Tensor y, Tensor y_last, Tensor? log_gamma, ScalarType accum_dtype) -> "
    "(Tensor, Tensor)",
    _backward,
    _backward_fake,
)
exp_product_scan_bwd_out = register(
    "exp_product_scan_bwd_out(Tensor dy, Tensor? dy_last, Tensor y, Tensor y_last, Tensor? log_gamma, ScalarType accum_dtype, "
    "Tensor(a!) dlog_gamma, Tensor(b!)? dy0) -> ()",
    _backward_out,
    lambda *arguments: None,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    log_gamma, y0, ctx.accum_dtype = inputs
    ctx.set_materialize_grads(False)
    # dlog_gamma needs the outputs alone; only the gradient to y0 forms the products again.
    ctx.save_for_backward(*output, None if y0 is None else log_gamma)
    ctx.y0_dtype = None if y0 is None else y0.dtype


def _autograd(ctx: Any, dy: Tensor | None, dy_last: Tensor | None) -> tuple[Tensor | None, ...]:
    y, y_last, log_gamma = ctx.saved_tensors
    dy = torch.zeros_like(y) if dy is None else dy
    dlog_gamma, dy0 = exp_product_scan_bwd(dy, dy_last, y, y_last, log_gamma, ctx.accum_dtype)
    return dlog_gamma, None if log_gamma is None else dy0.to(ctx.y0_dtype), None


register_backward(exp_product_scan_op, _autograd, _setup_context)
