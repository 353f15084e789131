"""`memory_address` in PyTorch, with what a vector was multiplied by, and its gradients: a CPU's form, and float64's."""

import torch
from torch import Tensor

from mmrec.ops.common import state_dtype
from mmrec.ops.memory_address.naive import EPS


def memory_address_scaled_forward(q: Tensor, k: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both addresses, contiguous, and `rsqrt(Σ(q + h)² + 1e-6)` and `k`'s, (B, T, H), in fp32 or wider."""
    wide = state_dtype(q, k, h)
    sums = [part.to(wide) + h.to(wide) for part in (q, k)]
    q_scale, k_scale = (norm_scale(s) for s in sums)
    q_out, k_out = (
        (s * scale.unsqueeze(-1)).to(part.dtype).contiguous() for s, scale, part in zip(sums, (q_scale, k_scale), (q, k), strict=True)
    )
    return q_out, k_out, q_scale, k_scale


def memory_address_gradients(dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`dq`, `dk` and `dh`, in fp32 or wider."""
    wide = state_dtype(q, k, h)
    sums = [part.to(wide) + h.to(wide) for part in (q, k)]
    scales = [norm_scale(s) for s in sums]
    units = [s * scale.unsqueeze(-1) for s, scale in zip(sums, scales, strict=True)]
    return gradients_of_units(dq_out.to(wide), dk_out.to(wide), *units, *scales)


def gradients_of_units(
    dq_out: Tensor, dk_out: Tensor, q_unit: Tensor, k_unit: Tensor, q_scale: Tensor, k_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the addresses and their scales: what the norms were taken of is not needed."""
    dq, dk = _through_norm(dq_out, q_unit, q_scale), _through_norm(dk_out, k_unit, k_scale)
    return dq, dk, dq + dk


def norm_scale(s: Tensor) -> Tensor:
    """`n = rsqrt(Σs² + 1e-6)` over the last dimension."""
    return torch.rsqrt(s.square().sum(-1) + EPS)


def _through_norm(gradient: Tensor, unit: Tensor, scale: Tensor) -> Tensor:
    """`n (g − n² ⟨s, g⟩ s)` with `unit = s n`."""
    return scale.unsqueeze(-1) * (gradient - unit * (unit * gradient).sum(-1, keepdim=True))
