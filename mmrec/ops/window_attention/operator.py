"""`window_attention` as operators of torch: the functional one with its autograd formula, and a backward into the caller's buffers.

They know no state: keys are S = P + T, those of P tokens before the sequence in front.
"""

from typing import Any

import torch
from torch import Tensor

from mmrec.ops.common import state_dtype
from mmrec.ops.registration import register, register_backward, runs_kernel
from mmrec.ops.window_attention.pytorch import window_attention_forward, window_attention_gradients


def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, temperature: Tensor, first: Tensor | None, window: int
) -> tuple[Tensor, Tensor]:
    if runs_kernel(q, state_dtype(q, k, v, log_alpha, temperature)):
        from mmrec.ops.window_attention.launchers import launch_forward  # Triton exists on Linux alone

        return launch_forward(q, k, v, log_alpha, temperature, first, window)
    # Autocast would run the matrix products in bf16, the scores' among them.
    with torch.autocast(q.device.type, enabled=False):
        return window_attention_forward(q, k, v, log_alpha, temperature, first, window)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, temperature: Tensor, first: Tensor | None, window: int
) -> tuple[Tensor, Tensor]:
    batch, time, heads, _ = q.shape
    dtype = state_dtype(q, k, v, log_alpha, temperature)
    return v.new_empty((batch, time, heads, v.shape[-1])), q.new_empty((batch, heads, time), dtype=dtype)


def _backward_out(
    dr: Tensor,
    r: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    temperature: Tensor,
    first: Tensor | None,
    window: int,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dlog_alpha: Tensor,
    dtemperature: Tensor,
) -> None:
    gradients = (dq, dk, dv, dlog_alpha, dtemperature)
    if runs_kernel(q, state_dtype(q, k, v, log_alpha, temperature)):
        from mmrec.ops.window_attention.launchers import launch_backward

        launch_backward(dr, r, lse, q, k, v, log_alpha, temperature, first, window, *gradients)
        return
    with torch.autocast(q.device.type, enabled=False):
        values = window_attention_gradients(dr, lse, q, k, v, log_alpha, temperature, first, window)
    for gradient, value in zip(gradients, values, strict=True):
        gradient.copy_(value)


def _backward_fake(
    dr: Tensor,
    r: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    temperature: Tensor,
    first: Tensor | None,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dlog_alpha, dtemperature = (tensor.new_empty(tensor.shape) for tensor in (q, k, v, log_alpha, temperature))
    return dq, dk, dv, dlog_alpha, dtemperature


def _backward(
    dr: Tensor,
    r: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    temperature: Tensor,
    first: Tensor | None,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments = (dr, r, lse, q, k, v, log_alpha, temperature, first, window)
    gradients = _backward_fake(*arguments)
    _backward_out(*arguments, *gradients)
    return gradients


_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor log_alpha, Tensor temperature, Tensor? first, int window"
# The scores' log-sum-exp, a number a query, leaves beside the read-out for the backward.
window_attention_op = register(f"window_attention({_ARGUMENTS}) -> (Tensor, Tensor)", _forward, _forward_fake)
_INPUTS = f"Tensor dr, Tensor r, Tensor lse, {_ARGUMENTS}"
window_attention_bwd = register(f"window_attention_bwd({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _backward, _backward_fake)
window_attention_bwd_out = register(
    f"window_attention_bwd_out({_INPUTS}, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) dlog_alpha, "
    "Tensor(e!) dtemperature) -> ()",
    _backward_out,
    lambda *arguments: None,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *tensors)


def _autograd(ctx: Any, dr: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dr is None:
        return (None,) * 7
    gradients: tuple[Tensor, ...] = window_attention_bwd(dr, *ctx.saved_tensors, ctx.window)
    return *gradients, None, None


register_backward(window_attention_op, _autograd, _setup_context)
