"""A matrix product whose result is wider than its factors, as an operator of torch, so that a compiler sees one node."""

import torch
from torch import Tensor

from mmrec.ops.registration import register


def _forward(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == dtype:
            return torch.mm(a, b)
        # A GPU adds up in fp32 anyway, and can store the sums as they are; a CPU's product cannot.
        return torch.mm(a, b, out_dtype=dtype) if a.is_cuda and dtype == torch.float32 else torch.mm(a.to(dtype), b.to(dtype))


wide_product_op = register(
    "wide_product(Tensor a, Tensor b, ScalarType dtype) -> Tensor",
    _forward,
    lambda a, b, dtype: a.new_empty((a.shape[0], b.shape[1]), dtype=dtype),
)


def wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a b` (M, N) in `dtype`, of factors (M, K) and (K, N) of one dtype, as wide or narrower; not rounded to theirs. Not differentiable.

    A product that rounds to bf16, and a pass that widens to fp32 again, would move 6 bytes an element more.
    """
    product: Tensor = wide_product_op(a, b, dtype)
    return product
