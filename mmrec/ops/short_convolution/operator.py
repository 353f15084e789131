"""`short_convolution` as operators of torch: the functional one with its autograd formula, and a backward into the caller's buffers.

They know no state: its tokens are put in front.
"""

from typing import Any

import torch
from torch import Tensor

from mmrec.ops.common import state_dtype
from mmrec.ops.registration import register, register_backward, runs_kernel
from mmrec.ops.short_convolution.pytorch import short_convolution_forward, short_convolution_gradients


def _forward(x: Tensor, weight: Tensor, reset: Tensor | None) -> Tensor:
    if runs_kernel(x, state_dtype(x, weight)):
        from mmrec.ops.short_convolution.kernels import launch_forward  # Triton exists on Linux alone

        return launch_forward(x, weight, reset)
    return short_convolution_forward(x, weight, reset).contiguous()


def _backward_out(dy: Tensor, x: Tensor, weight: Tensor, reset: Tensor | None, dx: Tensor, dweight: Tensor) -> None:
    if runs_kernel(x, state_dtype(x, weight)):
        from mmrec.ops.short_convolution.kernels import launch_backward

        launch_backward(dy, x, weight, reset, dx, dweight)
        return
    for gradient, value in zip((dx, dweight), short_convolution_gradients(dy, x, weight, reset), strict=True):
        gradient.copy_(value)


def _backward_fake(dy: Tensor, x: Tensor, weight: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _backward(dy: Tensor, x: Tensor, weight: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    gradients = _backward_fake(dy, x, weight, reset)
    _backward_out(dy, x, weight, reset, *gradients)
    return gradients


_ARGUMENTS = "Tensor x, Tensor weight, Tensor? reset"
short_convolution_op = register(
    f"short_convolution({_ARGUMENTS}) -> Tensor", _forward, lambda x, weight, reset: torch.empty(x.shape, dtype=x.dtype, device=x.device)
)
short_convolution_bwd = register(f"short_convolution_bwd(Tensor dy, {_ARGUMENTS}) -> (Tensor, Tensor)", _backward, _backward_fake)
short_convolution_bwd_out = register(
    f"short_convolution_bwd_out(Tensor dy, {_ARGUMENTS}, Tensor(a!) dx, Tensor(b!) dweight) -> ()",
    _backward_out,
    lambda *arguments: None,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return (*short_convolution_bwd(dy, *ctx.saved_tensors), None)


register_backward(short_convolution_op, _autograd, _setup_context)
