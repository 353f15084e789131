"""How the residual stream begins, and how a branch leaves it: the norm at its start. It comes back by `linear.add_linear`."""

import torch
from torch import Tensor, nn

from mmrec.ops import rms_norm, rms_norm_branch
from mmrec.ops.rms_norm import Branch


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` over the last dimension by our operator: fp32 inside, the output in the input's dtype, also under autocast."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to the same."""
        return rms_norm(x, self.weight, self.eps)

    def branch(self, x: Tensor, overwritten: bool = False) -> Branch:
        """The normed stream for two readers, and the stream, whose gradients meet in one pass (see `rms_norm_branch`)."""
        return rms_norm_branch(x, self.weight, self.eps, overwritten)


def embed(embedding: nn.Embedding, input_ids: Tensor, scale: float) -> Tensor:
    """The start of the residual stream, (B, T, D); under autocast in its dtype: fp32 would move twice the bytes everywhere."""
    x: Tensor = embedding(input_ids) * scale
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) and x.dtype == torch.float32 else x
