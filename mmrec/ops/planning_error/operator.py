"""`planning_error` as operators of torch: the functional one with its autograd formula, and a backward into the caller's buffers."""

from typing import Any

from torch import Tensor

from mmrec.ops.common import state_dtype
from mmrec.ops.planning_error.naive import planning_error_naive
from mmrec.ops.planning_error.pytorch import planning_error_gradients
from mmrec.ops.registration import register, register_backward, runs_kernel


def _forward(updated: Tensor, planned: Tensor, first: Tensor | None, counted: Tensor) -> Tensor:
    if runs_kernel(updated, state_dtype(updated, planned, first)):
        from mmrec.ops.planning_error.kernels import launch_forward  # Triton exists on Linux alone

        return launch_forward(updated, planned, first, counted)
    return planning_error_naive(updated, planned, first, counted)


def _forward_fake(updated: Tensor, planned: Tensor, first: Tensor | None, counted: Tensor) -> Tensor:
    return updated.new_empty((), dtype=state_dtype(updated, planned, first))


def _backward_out(
    dtotal: Tensor,
    updated: Tensor,
    planned: Tensor,
    first: Tensor | None,
    counted: Tensor,
    dupdated: Tensor,
    dplanned: Tensor,
    dfirst: Tensor,
) -> None:
    gradients = (dupdated, dplanned, dfirst)
    if runs_kernel(updated, state_dtype(updated, planned, first)):
        from mmrec.ops.planning_error.kernels import launch_backward

        launch_backward(dtotal, updated, planned, first, counted, *gradients)
        return
    for gradient, value in zip(gradients, planning_error_gradients(dtotal, updated, planned, first, counted), strict=True):
        gradient.copy_(value)


def _backward_fake(
    dtotal: Tensor, updated: Tensor, planned: Tensor, first: Tensor | None, counted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dfirst = planned.new_empty((planned.shape[0], planned.shape[2])) if first is None else first.new_empty(first.shape)
    return updated.new_empty(updated.shape), planned.new_empty(planned.shape), dfirst


def _backward(dtotal: Tensor, updated: Tensor, planned: Tensor, first: Tensor | None, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _backward_fake(dtotal, updated, planned, first, counted)
    _backward_out(dtotal, updated, planned, first, counted, *gradients)
    return gradients


_ARGUMENTS = "Tensor updated, Tensor planned, Tensor? first, Tensor counted"
planning_error_op = register(f"planning_error({_ARGUMENTS}) -> Tensor", _forward, _forward_fake)
planning_error_bwd = register(f"planning_error_bwd(Tensor dtotal, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _backward, _backward_fake)
planning_error_bwd_out = register(
    f"planning_error_bwd_out(Tensor dtotal, {_ARGUMENTS}, Tensor(a!) dupdated, Tensor(b!) dplanned, Tensor(c!) dfirst) -> ()",
    _backward_out,
    lambda *arguments: None,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    dupdated, dplanned, dfirst = planning_error_bwd(dtotal, *inputs)
    return dupdated, dplanned, None if inputs[2] is None else dfirst, None


register_backward(planning_error_op, _autograd, _setup_context)
