"""`memory_scan` as operators of torch: the functional one with its autograd formula, and a backward into the caller's buffers."""

from typing import Any

import torch
from torch import Tensor

from mmrec.ops.common import state_dtype
from mmrec.ops.memory_scan.pytorch import memory_scan_forward, memory_scan_gradients
from mmrec.ops.registration import register, register_backward, runs_kernel


def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, M0: Tensor | None, reset: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    if runs_kernel(q, state_dtype(q, k, v, log_alpha, M0)):
        from mmrec.ops.memory_scan.launchers import launch_forward  # Triton exists on Linux alone

        return launch_forward(q, k, v, log_alpha, M0, reset, scale)
    # Autocast would run the matrix products in bf16, those that carry the memory among them.
    with torch.autocast(q.device.type, enabled=False):
        return memory_scan_forward(q, k, v, log_alpha, M0, reset, scale)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, M0: Tensor | None, reset: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    batch, _, heads, key_width = k.shape
    return q.new_empty(v.shape), q.new_empty((batch, heads, key_width, v.shape[-1]), dtype=state_dtype(q, k, v, log_alpha, M0))


def _kept(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, M0: Tensor | None, reset: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    memories = _new_memories(q, k, v, log_alpha, M0, reset)
    if memories.numel() == 0:
        return *_forward(q, k, v, log_alpha, M0, reset, scale), memories
    from mmrec.ops.memory_scan.launchers import launch_forward

    return *launch_forward(q, k, v, log_alpha, M0, reset, scale, memories), memories


def _kept_fake(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, M0: Tensor | None, reset: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return *_forward_fake(q, k, v, log_alpha, M0, reset, scale), _new_memories(q, k, v, log_alpha, M0, reset)


def _new_memories(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, M0: Tensor | None, reset: Tensor | None) -> Tensor:
    """Room for what a forward keeps of its memories; nothing, (0,), in the PyTorch form, and where the launchers see no use for them."""
    if not runs_kernel(q, state_dtype(q, k, v, log_alpha, M0)):
        return q.new_empty((0,))
    from mmrec.ops.memory_scan.launchers import new_memories

    return new_memories(q, k, v, log_alpha, reset)


def _backward_out(
    dr: Tensor,
    dM_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    M0: Tensor | None,
    reset: Tensor | None,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dlog_alpha: Tensor,
    dM0: Tensor,
    memories: Tensor | None = None,
) -> None:
    if runs_kernel(q, state_dtype(q, k, v, log_alpha, M0)):
        from mmrec.ops.memory_scan.launchers import launch_backward

        launch_backward(dr, dM_last, q, k, v, log_alpha, M0, reset, scale, dq, dk, dv, dlog_alpha, dM0, memories)
        return
    with torch.autocast(q.device.type, enabled=False):
        values = memory_scan_gradients(dr, dM_last, q, k, v, log_alpha, M0, reset, scale)
    for gradient, value in zip((dq, dk, dv, dlog_alpha, dM0), values, strict=True):
        gradient.copy_(value)


def _backward_fake(
    dr: Tensor,
    dM_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    M0: Tensor | None,
    reset: Tensor | None,
    scale: float,
    memories: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, _, heads, key_width = k.shape
    dM0 = q.new_empty((batch, heads, key_width, v.shape[-1]), dtype=state_dtype(q, k, v, log_alpha, M0))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), log_alpha.new_empty(log_alpha.shape), dM0


def _backward(
    dr: Tensor,
    dM_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    M0: Tensor | None,
    reset: Tensor | None,
    scale: float,
    memories: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = _backward_fake(dr, dM_last, q, k, v, log_alpha, M0, reset, scale)
    _backward_out(dr, dM_last, q, k, v, log_alpha, M0, reset, scale, *gradients, memories)
    return gradients


_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor log_alpha, Tensor? M0, Tensor? reset, float scale"
memory_scan_op = register(f"memory_scan({_ARGUMENTS}) -> (Tensor, Tensor)", _forward, _forward_fake)
# The same with the memories that enter the chunks, so that a backward need not make them again: (B·S·H, N, K, V), of N chunks in each of S
# segments (most often one); or nothing, (0,).
memory_scan_kept_op = register(f"memory_scan_kept({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _kept, _kept_fake)
_INPUTS = f"Tensor dr, Tensor? dM_last, {_ARGUMENTS}"
memory_scan_bwd = register(
    f"memory_scan_bwd({_INPUTS}, Tensor? memories=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _backward, _backward_fake
)
memory_scan_bwd_out = register(
    f"memory_scan_bwd_out({_INPUTS}, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) dlog_alpha, Tensor(e!) dM0, "
    "Tensor? memories=None) -> ()",
    _backward_out,
    lambda *arguments: None,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_alpha, M0, reset, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    # The inputs, and the memories between the chunks only where they are asked for: they are T·K·V/64 elements a head.
    kept = output[2:]
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(q, k, v, log_alpha, M0, reset, *kept)


def _autograd(ctx: Any, dr: Tensor | None, dM_last: Tensor | None, *no_gradient: None) -> tuple[Tensor | None, ...]:
    q, k, v, log_alpha, M0, reset, *kept = ctx.saved_tensors
    dr = q.new_zeros(v.shape) if dr is None else dr
    dq, dk, dv, dlog_alpha, dM0 = memory_scan_bwd(dr, dM_last, q, k, v, log_alpha, M0, reset, ctx.scale, *kept)
    return dq, dk, dv, dlog_alpha, None if M0 is None else dM0.to(M0.dtype), None, None


register_backward(memory_scan_op, _autograd, _setup_context)
register_backward(memory_scan_kept_op, _autograd, _setup_context)
