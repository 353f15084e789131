"""Ground truth of `linear_scan`: a plain loop over time."""

import torch
from torch import Tensor

from mmrec.ops.common import state_dtype


def linear_scan_naive(x: Tensor, log_a: Tensor, h0: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`h_t = a_t h_{t-1} + x_t`; same signature as the public operator."""
    dtype = state_dtype(x, log_a, h0)
    batch, time, channels = x.shape
    h = torch.zeros(batch, channels, dtype=dtype, device=x.device) if h0 is None else h0.to(dtype)
    outputs = []
    for t in range(time):
        if reset is not None:
            h = h.masked_fill(reset[:, t, None], 0)
        h = log_a[:, t].to(dtype).exp() * h + x[:, t].to(dtype)
        outputs.append(h)
    return torch.stack(outputs, dim=1).to(x.dtype), h
