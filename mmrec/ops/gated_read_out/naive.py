"""The truth of `gated_read_out`, differentiated by autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_read_out_naive(r: Tensor, h: Tensor, e: Tensor, g_r: Tensor, g_h: Tensor, eps: float) -> Tensor:
    """See the public function."""
    wide = torch.promote_types(torch.promote_types(r.dtype, h.dtype), torch.float32)
    width = (r.shape[-1],)
    recalled = F.rms_norm(r.to(wide), width, eps=eps) * g_r.to(wide)
    recent = F.rms_norm(h.to(wide), width, eps=eps) * g_h.to(wide)
    return (torch.sigmoid(e.to(wide)) * (recalled + recent)).to(e.dtype)
