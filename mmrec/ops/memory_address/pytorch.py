"""Gradients of `memory_address` in PyTorch: a CPU's form, and float64's."""

import torch
from torch import Tensor

from mmrec.ops.memory_address.naive import EPS


def memory_address_gradients(dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`dq`, `dk` and `dh`, in fp32 or wider."""
    wide = torch.promote_types(torch.promote_types(q.dtype, h.dtype), torch.float32)
    dq, dk = (_through_norm(gradient.to(wide), part.to(wide) + h.to(wide)) for gradient, part in ((dq_out, q), (dk_out, k)))
    return dq, dk, dq + dk


def _through_norm(gradient: Tensor, s: Tensor) -> Tensor:
    """`n (g − n² ⟨s, g⟩ s)` with `n = rsqrt(Σs² + 1e-6)`."""
    scale = torch.rsqrt(s.square().sum(-1, keepdim=True) + EPS)
    unit = s * scale
    return scale * (gradient - unit * (unit * gradient).sum(-1, keepdim=True))
