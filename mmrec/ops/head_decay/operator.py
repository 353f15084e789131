"""`head_decay` as operators of torch: the functional one with its autograd formula, and a backward into the caller's buffers."""

from typing import Any

from torch import Tensor

from mmrec.ops.common import state_dtype
from mmrec.ops.head_decay.pytorch import head_decay_forward, head_decay_gradients
from mmrec.ops.registration import register, register_backward, runs_kernel


def _forward(x: Tensor, w_alpha: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    if runs_kernel(x, state_dtype(x, w_alpha, A_log, dt_bias)):
        from mmrec.ops.head_decay.kernels import launch_forward  # Triton exists on Linux alone

        return launch_forward(x, w_alpha, A_log, dt_bias)
    return head_decay_forward(x, w_alpha, A_log, dt_bias)


def _forward_fake(x: Tensor, w_alpha: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:2], w_alpha.shape[0])
    return w_alpha.new_empty(shape), w_alpha.new_empty(shape)


def _backward_out(
    dlog_alpha: Tensor,
    logits: Tensor,
    x: Tensor,
    w_alpha: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    dx: Tensor,
    dw_alpha: Tensor,
    dA_log: Tensor,
    ddt_bias: Tensor,
) -> None:
    gradients = (dx, dw_alpha, dA_log, ddt_bias)
    if runs_kernel(x, state_dtype(x, w_alpha, A_log, dt_bias)):
        from mmrec.ops.head_decay.kernels import launch_backward

        launch_backward(dlog_alpha, logits, x, w_alpha, A_log, dt_bias, *gradients)
        return
    for gradient, value in zip(gradients, head_decay_gradients(dlog_alpha, logits, x, w_alpha, A_log, dt_bias), strict=True):
        gradient.copy_(value)


def _backward_fake(
    dlog_alpha: Tensor, logits: Tensor, x: Tensor, w_alpha: Tensor, A_log: Tensor, dt_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), w_alpha.new_empty(w_alpha.shape), A_log.new_empty(A_log.shape), dt_bias.new_empty(dt_bias.shape)


def _backward(
    dlog_alpha: Tensor, logits: Tensor, x: Tensor, w_alpha: Tensor, A_log: Tensor, dt_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = _backward_fake(dlog_alpha, logits, x, w_alpha, A_log, dt_bias)
    _backward_out(dlog_alpha, logits, x, w_alpha, A_log, dt_bias, *gradients)
    return gradients


_ARGUMENTS = "Tensor x, Tensor w_alpha, Tensor A_log, Tensor dt_bias"
# The logits, of H numbers a token, leave beside the decays: the backward would have to read the input twice to form them again.
head_decay_op = register(f"head_decay({_ARGUMENTS}) -> (Tensor, Tensor)", _forward, _forward_fake)
_INPUTS = f"Tensor dlog_alpha, Tensor logits, {_ARGUMENTS}"
head_decay_bwd = register(f"head_decay_bwd({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)", _backward, _backward_fake)
head_decay_bwd_out = register(
    f"head_decay_bwd_out({_INPUTS}, Tensor(a!) dx, Tensor(b!) dw_alpha, Tensor(c!) dA_log, Tensor(d!) ddt_bias) -> ()",
    _backward_out,
    lambda *arguments: None,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *inputs)


def _autograd(ctx: Any, dlog_alpha: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dlog_alpha is None:
        return (None,) * 4
    gradients: tuple[Tensor, ...] = head_decay_bwd(dlog_alpha, *ctx.saved_tensors)
    return gradients


register_backward(head_decay_op, _autograd, _setup_context)
