"""Gradients of `decay_log` in PyTorch: a CPU's form, and float64's."""

import torch
from torch import Tensor

from mmrec.ops.decay_log.naive import decay_log_naive


def decay_log_gradients(
    dlog_gamma: Tensor, logits: Tensor, bias: Tensor, context: Tensor | None, context_bias: Tensor | None, low: float, high: float
) -> tuple[Tensor, ...]:
    """`dlogits` and `dbias`, and the context's two where there is one, in fp32 or wider."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    unbounded = decay_log_naive(logits, bias, context, context_bias, float("-inf"), float("inf"))
    inside = dlog_gamma.to(wide) * ((unbounded >= low) & (unbounded <= high))
    dlogits = inside * torch.sigmoid(-(logits.to(wide) + bias))
    if context is None or context_bias is None:
        return dlogits, dlogits.sum((0, 1))
    dcontext = inside * torch.sigmoid(-(context.to(wide) + context_bias))
    return dlogits, dlogits.sum((0, 1)), dcontext, dcontext.sum((0, 1))
