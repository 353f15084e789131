"""Gradients of `gated_read_out` in PyTorch: a CPU's form, and float64's."""

import torch
from torch import Tensor


def gated_read_out_gradients(
    dy: Tensor, r: Tensor, h: Tensor, e: Tensor, g_r: Tensor, g_h: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`dr`, `dh`, `de`, `dg_r` and `dg_h`, in fp32 or wider."""
    wide = torch.promote_types(torch.promote_types(r.dtype, h.dtype), torch.float32)
    gate = torch.sigmoid(e.to(wide))
    gradient = dy.to(wide)
    weighted = gradient * gate
    gains = (g_r.to(wide), g_h.to(wide))
    norms = []
    states = []
    for x, gain in zip((r.to(wide), h.to(wide)), gains, strict=True):
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        unit = x * scale
        d_unit = weighted * gain
        norms.append(unit)
        states.append(scale * (d_unit - unit * (unit * d_unit).mean(-1, keepdim=True)))
    total = norms[0] * gains[0] + norms[1] * gains[1]
    return (*states, gradient * total * gate * (1 - gate), *((weighted * unit).sum((0, 1)) for unit in norms))  # type: ignore[return-value]
