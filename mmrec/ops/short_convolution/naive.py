"""The truth of `short_convolution`: a loop over time that carries the last tokens, differentiated by autograd."""

import torch
from torch import Tensor


def short_convolution_naive(x: Tensor, weight: Tensor, state: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See the public function."""
    wide = torch.promote_types(x.dtype, torch.float32)
    batch, time, channels = x.shape
    past = x.new_zeros((batch, weight.shape[1] - 1, channels)) if state is None else state.to(x.dtype)
    outputs = []
    for t in range(time):
        if reset is not None:
            past = past.masked_fill(reset[:, t, None, None], 0)
        tokens = torch.cat([past, x[:, t : t + 1]], dim=1)
        outputs.append((tokens.to(wide) * weight.t().to(wide)).sum(1))
        past = tokens[:, 1:]
    return torch.stack(outputs, dim=1).to(x.dtype), past
