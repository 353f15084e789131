"""`memory_address` as operators of torch: the functional one with its autograd formula, and a backward into the caller's buffers."""

from typing import Any

import torch
from torch import Tensor

from mmrec.ops.common import state_dtype
from mmrec.ops.memory_address.naive import memory_address_naive
from mmrec.ops.memory_address.pytorch import memory_address_gradients, memory_address_scaled_forward
from mmrec.ops.registration import register, register_backward, runs_kernel


def _forward(q: Tensor, k: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    if runs_kernel(q, state_dtype(q, k, h)):
        from mmrec.ops.memory_address.kernels import launch_forward  # Triton exists on Linux alone

        return launch_forward(q, k, h)
    q_out, k_out = memory_address_naive(q, k, h)
    return q_out.contiguous(), k_out.contiguous()


def _forward_fake(q: Tensor, k: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _scaled(q: Tensor, k: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if runs_kernel(q, state_dtype(q, k, h)):
        from mmrec.ops.memory_address.kernels import launch_forward

        q_scale, k_scale = (torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device) for _ in range(2))
        return *launch_forward(q, k, h, q_scale, k_scale), q_scale, k_scale
    return memory_address_scaled_forward(q, k, h)


def _scaled_fake(q: Tensor, k: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q_scale, k_scale = (q.new_empty(q.shape[:-1], dtype=state_dtype(q, k, h)) for _ in range(2))
    return *_forward_fake(q, k, h), q_scale, k_scale


def _backward_out(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    h: Tensor,
    dq: Tensor,
    dk: Tensor,
    dh: Tensor,
    dh_more: Tensor | None = None,
) -> None:
    if runs_kernel(q, state_dtype(q, k, h)):
        from mmrec.ops.memory_address.kernels import launch_backward

        launch_backward(dq_out, dk_out, q, k, h, dq, dk, dh, dh_more)
        return
    *gradients, dh_own = memory_address_gradients(dq_out, dk_out, q, k, h)
    for gradient, value in zip((dq, dk, dh), (*gradients, dh_own if dh_more is None else dh_own + dh_more), strict=True):
        gradient.copy_(value)


def _backward_fake(dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), h.new_empty(h.shape)


def _backward(dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _backward_fake(dq_out, dk_out, q, k, h)
    _backward_out(dq_out, dk_out, q, k, h, *gradients)
    return gradients


memory_address_op = register("memory_address(Tensor q, Tensor k, Tensor h) -> (Tensor, Tensor)", _forward, _forward_fake)
# The same with the two scales (B, T, H), fp32, with which a backward finds its way through the norms from the addresses alone.
memory_address_scaled_op = register(
    "memory_address_scaled(Tensor q, Tensor k, Tensor h) -> (Tensor, Tensor, Tensor, Tensor)", _scaled, _scaled_fake
)
_INPUTS = "Tensor dq_out, Tensor dk_out, Tensor q, Tensor k, Tensor h"
memory_address_bwd = register(f"memory_address_bwd({_INPUTS}) -> (Tensor, Tensor, Tensor)", _backward, _backward_fake)
# `dh_more`: the gradient that reaches `h` by other ways; it is added to what is written to `dh`.
memory_address_bwd_out = register(
    f"memory_address_bwd_out({_INPUTS}, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dh, Tensor? dh_more=None) -> ()",
    _backward_out,
    lambda *arguments: None,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    # The inputs, which the scans keep anyway, rather than the addresses: nothing more is kept.
    ctx.save_for_backward(*inputs)


def _setup_scaled(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[2:])
    _setup_context(ctx, inputs, output[:2])


def _autograd(ctx: Any, dq_out: Tensor | None, dk_out: Tensor | None, *no_gradients: None) -> tuple[Tensor, ...]:
    q, k, h = ctx.saved_tensors
    gradients: tuple[Tensor, ...] = memory_address_bwd(
        torch.zeros_like(q) if dq_out is None else dq_out, torch.zeros_like(k) if dk_out is None else dk_out, q, k, h
    )
    return gradients


register_backward(memory_address_op, _autograd, _setup_context)
register_backward(memory_address_scaled_op, _autograd, _setup_scaled)
