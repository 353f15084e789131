"""`swiglu` as operators of torch: the functional one with its autograd formula, and a backward into the caller's buffer."""

from typing import Any

from torch import Tensor

from mmrec.ops.common import state_dtype
from mmrec.ops.registration import register, register_backward, runs_kernel
from mmrec.ops.swiglu.naive import swiglu_naive
from mmrec.ops.swiglu.pytorch import swiglu_gradient


def _forward(gate_up: Tensor) -> Tensor:
    if runs_kernel(gate_up, state_dtype(gate_up)):
        from mmrec.ops.swiglu.kernels import launch_forward  # Triton exists on Linux alone

        return launch_forward(gate_up)
    return swiglu_naive(gate_up).contiguous()


def _forward_fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:2], gate_up.shape[2] // 2))


def _backward_out(dy: Tensor, gate_up: Tensor, dgate_up: Tensor) -> None:
    if runs_kernel(gate_up, state_dtype(gate_up)):
        from mmrec.ops.swiglu.kernels import launch_backward

        launch_backward(dy, gate_up, dgate_up)
        return
    dgate_up.copy_(swiglu_gradient(dy, gate_up))


def _backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    dgate_up = gate_up.new_empty(gate_up.shape)
    _backward_out(dy, gate_up, dgate_up)
    return dgate_up


swiglu_op = register("swiglu(Tensor gate_up) -> Tensor", _forward, _forward_fake)
swiglu_bwd = register("swiglu_bwd(Tensor dy, Tensor gate_up) -> Tensor", _backward, lambda dy, gate_up: gate_up.new_empty(gate_up.shape))
swiglu_bwd_out = register("swiglu_bwd_out(Tensor dy, Tensor gate_up, Tensor(a!) dgate_up) -> ()", _backward_out, lambda *arguments: None)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, dy: Tensor) -> Tensor:
    gradient: Tensor = swiglu_bwd(dy, *ctx.saved_tensors)
    return gradient


register_backward(swiglu_op, _autograd, _setup_context)
