"""Ground truth of `exp_product_scan`: a plain loop over time."""

import torch
from torch import Tensor

from mmrec.ops.common import state_dtype


def exp_product_scan_naive(
    log_gamma: Tensor, y0: Tensor | None = None, *, accum_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """`Y_t = y0 · ∏_{i≤t} γ_i`; same signature as the public operator."""
    dtype = torch.promote_types(state_dtype(log_gamma, y0), accum_dtype)
    batch, time, channels = log_gamma.shape
    log_product = torch.zeros(batch, channels, dtype=dtype, device=log_gamma.device)
    start = torch.ones_like(log_product) if y0 is None else y0.to(dtype)
    outputs = []
    for t in range(time):
        log_product = log_product + log_gamma[:, t].to(dtype)
        outputs.append(start * log_product.exp())
    return torch.stack(outputs, dim=1).to(log_gamma.dtype), outputs[-1].to(state_dtype(log_gamma, y0))
