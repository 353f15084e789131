"""`gated_scan_from_logits` as operators of torch: with its autograd formula, and a backward into the caller's buffers."""

from typing import Any

import torch
from torch import Tensor

from mmrec.ops.decay_log.naive import decay_log_naive
from mmrec.ops.decay_log.pytorch import decay_log_gradients
from mmrec.ops.gated_scan.logits import Inputs
from mmrec.ops.gated_scan.pytorch import gated_scan_forward, gated_scan_gradients
from mmrec.ops.registration import register, register_backward, runs_kernel

_INPUTS = (
    "Tensor z, Tensor p, Tensor logits, Tensor bias, Tensor? context, Tensor? context_bias, Tensor w_g, Tensor? h0, Tensor? reset, "
    "float low, float high"
)
_COUNT = len(Inputs._fields)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    given = Inputs(*arguments)
    if not runs_kernel(given.z, given.state_dtype()):
        log_gamma = decay_log_naive(*given.gates(), given.low, given.high)
        return gated_scan_forward(given.z, given.p, log_gamma, given.w_g, given.h0, given.reset)
    from mmrec.ops.gated_scan.kernels_from_logits import launch_forward  # Triton exists on Linux alone

    return launch_forward(given)


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    given = Inputs(*arguments)
    z = given.z
    return z.new_empty(z.shape), z.new_empty((z.shape[0], z.shape[2]), dtype=given.state_dtype())


def _backward_out(dh: Tensor, dh_last: Tensor | None, h: Tensor, *arguments: Any) -> None:
    """Writes the gradients into what follows the inputs: to z, p, logits, bias, context, context_bias, w_g and h0."""
    given, outputs = Inputs(*arguments[:_COUNT]), arguments[_COUNT:]
    if runs_kernel(dh, given.state_dtype()):
        from mmrec.ops.gated_scan.kernels_from_logits import launch_backward

        launch_backward(dh, dh_last, h, given, *outputs)
        return
    dz, dp, *of_gates, dw_g, dh0 = outputs
    log_gamma = decay_log_naive(*given.gates(), given.low, given.high)
    of_scan = gated_scan_gradients(dh, dh_last, h, given.z, given.p, log_gamma, given.w_g, given.h0, given.reset)
    values = (*of_scan[:2], *of_scan[3:], *decay_log_gradients(of_scan[2], *given.gates(), given.low, given.high))
    written = (dz, dp, dw_g, dh0, *(gradient for gradient in of_gates if gradient is not None))
    for gradient, value in zip(written, values, strict=True):
        gradient.copy_(value)


def _backward_fake(dh: Tensor, dh_last: Tensor | None, h: Tensor, *arguments: Any) -> list[Tensor]:
    given = Inputs(*arguments)
    inputs = (given.z, given.p, *given.gates(), given.w_g)
    dh0 = given.z.new_empty((given.z.shape[0], given.z.shape[2]), dtype=given.state_dtype())
    return [*(tensor.new_empty(tensor.shape) for tensor in inputs if tensor is not None), dh0]


def _backward(dh: Tensor, dh_last: Tensor | None, h: Tensor, *arguments: Any) -> list[Tensor]:
    gradients = _backward_fake(dh, dh_last, h, *arguments)
    dz, dp, dlogits, dbias, *of_context, dw_g, dh0 = gradients
    _backward_out(dh, dh_last, h, *arguments, dz, dp, dlogits, dbias, *(of_context or (None, None)), dw_g, dh0)
    return gradients


gated_scan_from_logits_op = register(f"gated_scan_from_logits({_INPUTS}) -> (Tensor, Tensor)", _forward, _forward_fake)
gated_scan_from_logits_bwd = register(
    f"gated_scan_from_logits_bwd(Tensor dh, Tensor? dh_last, Tensor h, {_INPUTS}) -> Tensor[]", _backward, _backward_fake
)
gated_scan_from_logits_bwd_out = register(
    f"gated_scan_from_logits_bwd_out(Tensor dh, Tensor? dh_last, Tensor h, {_INPUTS}, "
    "Tensor(a!) dz, Tensor(b!) dp, Tensor(c!) dlogits, Tensor(d!) dbias, Tensor(e!)? dcontext, Tensor(f!)? dcontext_bias, "
    "Tensor(g!) dw_g, Tensor(h!) dh0) -> ()",
    _backward_out,
    lambda *arguments: None,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    *tensors, ctx.low, ctx.high = inputs
    ctx.save_for_backward(output[0], *tensors)


def _autograd(ctx: Any, dh: Tensor | None, dh_last: Tensor | None) -> tuple[Tensor | None, ...]:
    h, *tensors = ctx.saved_tensors
    gradients = gated_scan_from_logits_bwd(torch.zeros_like(h) if dh is None else dh, dh_last, h, *tensors, ctx.low, ctx.high)
    dz, dp, dlogits, dbias, *of_context, dw_g, dh0 = gradients
    h0 = tensors[7]
    return dz, dp, dlogits, dbias, *(of_context or [None, None]), dw_g, None if h0 is None else dh0.to(h0.dtype), None, None, None


register_backward(gated_scan_from_logits_op, _autograd, _setup_context)
