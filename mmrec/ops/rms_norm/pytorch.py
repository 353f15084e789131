"""The gradients of `rms_norm` in PyTorch: what runs on a CPU, and for float64."""

import torch
from torch import Tensor


def rms_norm_gradients(dy: Tensor, dy_more: Tensor | None, dx_more: Tensor | None, x: Tensor, weight: Tensor, eps: float) -> list[Tensor]:
    """`dx`, with `dx_more` added, and `dweight`, both in fp32 or wider."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    dy, x, weight = dy.to(dtype), x.to(dtype), weight.to(dtype)
    if dy_more is not None:
        dy = dy + dy_more
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    unit = x * scale
    d_unit = dy * weight
    dx = scale * (d_unit - unit * (unit * d_unit).mean(-1, keepdim=True))
    return [dx if dx_more is None else dx + dx_more, (dy * unit).sum((0, 1))]
