"""`head_decay` and its gradients in PyTorch: what runs on a CPU, and for float64."""

import torch
import torch.nn.functional as F
from torch import Tensor


def head_decay_forward(x: Tensor, w_alpha: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """`log α` and the logits before their bias, (B, T, H) each, in the dtype of the parameters."""
    with torch.autocast(x.device.type, enabled=False):
        logits = F.linear(x.to(w_alpha.dtype), w_alpha)
    return A_log.exp() * F.logsigmoid(-(logits + dt_bias)), logits


def head_decay_gradients(
    dlog_alpha: Tensor, logits: Tensor, x: Tensor, w_alpha: Tensor, A_log: Tensor, dt_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to `x`, `w_alpha`, `A_log` and `dt_bias`, in the dtype of the parameters."""
    rate, biased = A_log.exp(), logits + dt_bias
    dlogits = -dlog_alpha * rate * torch.sigmoid(biased)
    with torch.autocast(x.device.type, enabled=False):
        dw_alpha = dlogits.flatten(0, 1).T @ x.flatten(0, 1).to(dlogits.dtype)
        dx = dlogits @ w_alpha
    return dx, dw_alpha, (dlog_alpha * rate * F.logsigmoid(-biased)).sum((0, 1)), dlogits.sum((0, 1))
