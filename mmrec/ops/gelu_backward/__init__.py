"""The way back through a GELU, from what the forward kept of it: its input."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrec.ops.registration import register, runs_kernel


class GeluBackward(NamedTuple):
    """What `gelu_backward` returns.

    Attributes:
        hidden: (N, G), `GELU(inner)` again, which the next weight's gradient needs.
        dinner: (N, G), the cotangent of `inner`.
        dbias: (G,), its sum over the rows: the gradient of a bias that was added to `inner`.
    """

    hidden: Tensor
    dinner: Tensor
    dbias: Tensor


def gelu_backward(dhidden: Tensor, inner: Tensor, dtype: torch.dtype) -> GeluBackward:
    """Output, cotangent of the input and the bias's gradient of an exact GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415), in one pass.

    Args:
        dhidden: (N, G), the cotangent of the output.
        inner: (N, G), the input.
        dtype: of `dbias`, which is added up in fp32 or wider.
    """
    return GeluBackward(*gelu_backward_op(dhidden, inner, dtype))


def gelu_backward_torch(dhidden: Tensor, inner: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The same by torch's own functions, a pass each: a CPU's form, and float64's."""
    dinner = torch.ops.aten.gelu_backward(dhidden, inner)
    return F.gelu(inner), dinner, dinner.sum(0, dtype=dtype)


def _forward(dhidden: Tensor, inner: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    if runs_kernel(inner, torch.promote_types(inner.dtype, torch.float32)):
        from mmrec.ops.gelu_backward.kernels import launch  # Triton exists on Linux alone

        return launch(dhidden.contiguous(), inner.contiguous(), dtype)
    return gelu_backward_torch(dhidden, inner, dtype)


gelu_backward_op = register(
    "gelu_backward(Tensor dhidden, Tensor inner, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    _forward,
    lambda dhidden, inner, dtype: (torch.empty_like(inner), torch.empty_like(inner), inner.new_empty(inner.shape[1], dtype=dtype)),
)
