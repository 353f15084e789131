"""`short_convolution` in PyTorch, tap by tap: a CPU's form, and float64's."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def short_convolution_forward(x: Tensor, weight: Tensor, reset: Tensor | None) -> Tensor:
    """(B, T, C) in the dtype of `x`, summed in fp32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros(x.shape, dtype=wide, device=x.device)
    for back, gain, hidden in _taps(weight.to(wide), reset):
        earlier = F.pad(x.to(wide), (0, 0, back, 0))[:, : x.shape[1]]
        y += gain * (earlier if hidden is None else earlier.masked_fill(hidden, 0))
    return y.to(x.dtype)


def short_convolution_gradients(dy: Tensor, x: Tensor, weight: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """`dx`, (B, T, C), and `dweight`, (C, J), in fp32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    time = x.shape[1]
    dx = torch.zeros(x.shape, dtype=wide, device=x.device)
    columns = []
    for back, gain, hidden in _taps(weight.to(wide), reset):
        through = dy.to(wide) if hidden is None else dy.to(wide).masked_fill(hidden, 0)
        later = F.pad(through, (0, 0, 0, back))[:, back : back + time]  # what token t + j hands to token t
        dx += gain * later
        columns.append((x.to(wide) * later).sum((0, 1)))
    return dx, torch.stack(columns[::-1], dim=1)


def _taps(weight: Tensor, reset: Tensor | None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """How far each tap reaches back, its gains (C,), and at which tokens (B, T, 1) it reaches across a document's start; None: at none."""
    hidden = None
    for back in range(weight.shape[1]):
        if reset is not None and back:
            starts = F.pad(reset, (back - 1, 0))[:, : reset.shape[1]].unsqueeze(-1)
            hidden = starts if hidden is None else hidden | starts
        yield back, weight[:, -1 - back], hidden
