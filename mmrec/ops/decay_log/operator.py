"""`decay_log` as operators of torch: the functional one with its autograd formula, and a backward into the caller's buffers."""

from typing import Any

import torch
from torch import Tensor

from mmrec.ops.common import state_dtype
from mmrec.ops.decay_log.naive import decay_log_naive
from mmrec.ops.decay_log.pytorch import decay_log_gradients
from mmrec.ops.registration import register, register_backward, runs_kernel


def _forward(logits: Tensor, bias: Tensor, context: Tensor | None, context_bias: Tensor | None, low: float, high: float) -> Tensor:
    if runs_kernel(logits, state_dtype(logits, bias, context, context_bias)):
        from mmrec.ops.decay_log.kernels import launch_forward  # Triton exists on Linux alone

        return launch_forward(logits, bias, context, context_bias, low, high)
    return decay_log_naive(logits, bias, context, context_bias, low, high).contiguous()


def _forward_fake(logits: Tensor, bias: Tensor, context: Tensor | None, context_bias: Tensor | None, low: float, high: float) -> Tensor:
    return logits.new_empty(logits.shape, dtype=torch.promote_types(logits.dtype, torch.float32))


def _backward_out(
    dlog_gamma: Tensor,
    logits: Tensor,
    bias: Tensor,
    context: Tensor | None,
    context_bias: Tensor | None,
    low: float,
    high: float,
    dlogits: Tensor,
    dbias: Tensor,
    dcontext: Tensor | None,
    dcontext_bias: Tensor | None,
) -> None:
    if runs_kernel(logits, state_dtype(logits, bias, context, context_bias)):
        from mmrec.ops.decay_log.kernels import launch_backward

        launch_backward(dlog_gamma, logits, bias, context, context_bias, low, high, dlogits, dbias, dcontext, dcontext_bias)
        return
    values = decay_log_gradients(dlog_gamma, logits, bias, context, context_bias, low, high)
    for gradient, value in zip((dlogits, dbias, dcontext, dcontext_bias), values, strict=False):
        assert gradient is not None
        gradient.copy_(value)


def _backward_fake(
    dlog_gamma: Tensor, logits: Tensor, bias: Tensor, context: Tensor | None, context_bias: Tensor | None, low: float, high: float
) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in (logits, bias, context, context_bias) if tensor is not None]


def _backward(
    dlog_gamma: Tensor, logits: Tensor, bias: Tensor, context: Tensor | None, context_bias: Tensor | None, low: float, high: float
) -> list[Tensor]:
    gradients = _backward_fake(dlog_gamma, logits, bias, context, context_bias, low, high)
    rest = gradients[2:] if context is not None else [None, None]
    _backward_out(dlog_gamma, logits, bias, context, context_bias, low, high, *gradients[:2], *rest)
    return gradients


_ARGUMENTS = "Tensor logits, Tensor bias, Tensor? context, Tensor? context_bias, float low, float high"
decay_log_op = register(f"decay_log({_ARGUMENTS}) -> Tensor", _forward, _forward_fake)
decay_log_bwd = register(f"decay_log_bwd(Tensor dlog_gamma, {_ARGUMENTS}) -> Tensor[]", _backward, _backward_fake)
decay_log_bwd_out = register(
    f"decay_log_bwd_out(Tensor dlog_gamma, {_ARGUMENTS}, "
    "Tensor(a!) dlogits, Tensor(b!) dbias, Tensor(c!)? dcontext, Tensor(d!)? dcontext_bias) -> ()",
    _backward_out,
    lambda *arguments: None,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.low, ctx.high = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, dlog_gamma: Tensor) -> tuple[Tensor | None, ...]:
    gradients = decay_log_bwd(dlog_gamma, *ctx.saved_tensors, ctx.low, ctx.high)
    return (*gradients, *[None] * (6 - len(gradients)))


register_backward(decay_log_op, _autograd, _setup_context)
