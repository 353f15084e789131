"""Ground truth of `memory_scan`: a plain loop over time."""

import torch
from torch import Tensor

from mmrec.ops.common import state_dtype


def memory_scan_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    M0: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`M_t = α_t M_{t-1} + k_t v_tᵀ`, `r_t = scale · M_tᵀ q_t`; same signature as the public operator."""
    dtype = state_dtype(q, k, v, log_alpha, M0)
    batch, time, heads, key_width = k.shape
    memory = torch.zeros(batch, heads, key_width, v.shape[-1], dtype=dtype, device=q.device) if M0 is None else M0.to(dtype)
    outputs = []
    for t in range(time):
        if reset is not None:
            memory = memory.masked_fill(reset[:, t, None, None, None], 0)
        decay = log_alpha[:, t].to(dtype).exp()[..., None, None]
        memory = decay * memory + k[:, t].to(dtype).unsqueeze(-1) * v[:, t].to(dtype).unsqueeze(-2)
        # Not an einsum: autocast would run it in bf16.
        outputs.append(scale * (memory * q[:, t].to(dtype).unsqueeze(-1)).sum(-2))
    return torch.stack(outputs, dim=1).to(q.dtype), memory
