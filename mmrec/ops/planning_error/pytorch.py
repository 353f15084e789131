"""The gradients of `planning_error` in PyTorch: what runs on a CPU, and for float64."""

import torch
from torch import Tensor


def planning_error_gradients(
    dtotal: Tensor, updated: Tensor, planned: Tensor, first: Tensor | None, counted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to `updated`, `planned` and `first`, in fp32 or wider."""
    start = torch.zeros_like(planned[:, :1]) if first is None else first.unsqueeze(1)
    before = torch.cat([start.to(dtotal.dtype), planned[:, :-1].to(dtotal.dtype)], dim=1)
    dupdated = torch.where(counted.unsqueeze(-1), 2 * dtotal * (updated.to(dtotal.dtype) - before), 0)
    dplanned = torch.cat([-dupdated[:, 1:], torch.zeros_like(dupdated[:, :1])], dim=1)
    return dupdated, dplanned, -dupdated[:, 0]
