"""The truth of `planning_error`, differentiated by autograd."""

import torch
from torch import Tensor


def planning_error_naive(updated: Tensor, planned: Tensor, first: Tensor | None, counted: Tensor) -> Tensor:
    """See the public function."""
    wide = torch.promote_types(torch.promote_types(updated.dtype, planned.dtype), torch.float32)
    start = torch.zeros_like(planned[:, :1]) if first is None else first.unsqueeze(1)
    before = torch.cat([start.to(wide), planned[:, :-1].to(wide)], dim=1)
    squared = (updated.to(wide) - before).square().sum(-1)
    return torch.where(counted, squared, 0).sum()
