"""Ground truth of `gated_scan` and `gated_scan_from_logits`: a plain loop over time."""

import torch
from torch import Tensor

from mmrec.ops.common import state_dtype
from mmrec.ops.decay_log.naive import decay_log_naive


def gated_scan_naive(
    z: Tensor, p: Tensor, log_gamma: Tensor, w_g: Tensor, h0: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`h_t = (1 − γ_t) z_t σ(w_g h_{t-1} + p̄_t) + γ_t h_{t-1}`; same signature as the public operator."""
    dtype = state_dtype(z, p, log_gamma, w_g, h0)
    batch, time, channels = z.shape
    h = torch.zeros(batch, channels, dtype=dtype, device=z.device) if h0 is None else h0.to(dtype)
    gate_bias = p.to(dtype).repeat_interleave(channels // p.shape[-1], dim=-1)
    outputs = []
    for t in range(time):
        if reset is not None:
            h = h.masked_fill(reset[:, t, None], 0)
        log_gamma_t = log_gamma[:, t].to(dtype)
        write = -torch.expm1(log_gamma_t) * z[:, t].to(dtype)
        h = write * torch.sigmoid(w_g.to(dtype) * h + gate_bias[:, t]) + log_gamma_t.exp() * h
        outputs.append(h)
    return torch.stack(outputs, dim=1).to(z.dtype), h


def gated_scan_from_logits_naive(
    z: Tensor,
    p: Tensor,
    logits: Tensor,
    bias: Tensor,
    context: Tensor | None,
    context_bias: Tensor | None,
    w_g: Tensor,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor]:
    """`gated_scan` after `decay_log`; same signature as the public operator."""
    return gated_scan_naive(z, p, decay_log_naive(logits, bias, context, context_bias, low, high), w_g, h0, reset)
