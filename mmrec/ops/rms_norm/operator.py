"""`rms_norm` as operators of torch: the functional one with its autograd formula, and a backward into the caller's buffers."""

from typing import Any

import torch
from torch import Tensor

from mmrec.ops.common import state_dtype
from mmrec.ops.registration import register, register_backward, runs_kernel
from mmrec.ops.rms_norm.naive import rms_norm_naive
from mmrec.ops.rms_norm.pytorch import rms_norm_gradients


def _forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if runs_kernel(x, state_dtype(x, weight)):
        from mmrec.ops.rms_norm.kernels import launch_forward  # Triton exists on Linux alone

        return launch_forward(x, weight, eps)[0]
    return rms_norm_naive(x, weight, eps).contiguous()


def _with_copy(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if runs_kernel(x, state_dtype(x, weight)):
        from mmrec.ops.rms_norm.kernels import launch_forward

        normed, copy = launch_forward(x, weight, eps, copied=True)
        assert copy is not None
        return normed, copy
    return rms_norm_naive(x, weight, eps).contiguous(), x.clone(memory_format=torch.contiguous_format)


def _backward_out(
    dy: Tensor, dy_more: Tensor | None, dx_more: Tensor | None, x: Tensor, weight: Tensor, eps: float, dx: Tensor, dweight: Tensor
) -> None:
    if runs_kernel(x, state_dtype(x, weight)):
        from mmrec.ops.rms_norm.kernels import launch_backward

        launch_backward(dy, dy_more, dx_more, x, weight, eps, dx, dweight)
        return
    for gradient, value in zip((dx, dweight), rms_norm_gradients(dy, dy_more, dx_more, x, weight, eps), strict=True):
        gradient.copy_(value)


def _backward_fake(
    dy: Tensor, dy_more: Tensor | None, dx_more: Tensor | None, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _backward(dy: Tensor, dy_more: Tensor | None, dx_more: Tensor | None, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    gradients = _backward_fake(dy, dy_more, dx_more, x, weight, eps)
    _backward_out(dy, dy_more, dx_more, x, weight, eps, *gradients)
    return gradients


rms_norm_op = register("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _forward, lambda x, weight, eps: x.new_empty(x.shape))
rms_norm_with_copy = register(
    "rms_norm_with_copy(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _with_copy,
    lambda x, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
)
# `dy_more`: a second reader's gradient; `dx_more`: what reaches `x` past the norm.
_INPUTS = "Tensor dy, Tensor? dy_more, Tensor? dx_more, Tensor x, Tensor weight, float eps"
rms_norm_bwd = register(f"rms_norm_bwd({_INPUTS}) -> (Tensor, Tensor)", _backward, _backward_fake)
rms_norm_bwd_out = register(f"rms_norm_bwd_out({_INPUTS}, Tensor(a!) dx, Tensor(b!) dweight) -> ()", _backward_out, lambda *arguments: None)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return (*rms_norm_bwd(dy, None, None, *ctx.saved_tensors, ctx.eps), None)


register_backward(rms_norm_op, _autograd, _setup_context)
