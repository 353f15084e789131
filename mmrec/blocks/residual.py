"""How a branch leaves the residual stream and comes back to it: the norm at its start, the product that adds to the stream at its end."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrec.ops import rms_norm, rms_norm_branch


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` over the last dimension by our operator: fp32 inside, the output in the input's dtype, also under autocast."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to the same."""
        return rms_norm(x, self.weight, self.eps)

    def branch(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The normed stream for two readers, and the stream, whose gradients meet in one pass (see `rms_norm_branch`)."""
        return rms_norm_branch(x, self.weight, self.eps)


def add_linear(stream: Tensor, x: Tensor, linear: nn.Linear) -> Tensor:
    """`stream + linear(x)`, (B, T, D); the sum formed within the product on a GPU.

    Args:
        stream: (B, T, D).
        x: (B, T, K).
        linear: K → D without bias. One that is not plain (quantised, hooked or wrapped by a library) is called as a module.
    """
    return add_product(stream, x, linear.weight) if is_plain(linear) else stream + linear(x)


def is_plain(linear: nn.Linear) -> bool:
    """Whether nothing is lost where its weight is used without calling it: no subclass of a library's, no hooks."""
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    return type(linear) is nn.Linear and not any(hooks)


def add_product(stream: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`stream + x weightᵀ`, (B, T, D), for a weight (D, K); on a GPU within the product, which reads the stream as it writes its output."""
    if not stream.is_cuda or stream.dtype != x.dtype:  # autocast would round a wider stream within the product
        return stream + F.linear(x, weight)
    return torch.addmm(stream.flatten(0, 1), x.flatten(0, 1), weight.t()).view(stream.shape)
