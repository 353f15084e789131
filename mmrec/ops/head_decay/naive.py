"""The truth of `head_decay`, differentiated by autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor


def head_decay_naive(x: Tensor, w_alpha: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """See the public function."""
    with torch.autocast(x.device.type, enabled=False):
        logits = F.linear(x.to(torch.promote_types(x.dtype, w_alpha.dtype)), w_alpha)
        # logsigmoid(−x) = −softplus(x); softplus' own backward promises torch.compile strides that it does not keep (torch 2.13).
        return A_log.exp() * F.logsigmoid(-(logits + dt_bias))
