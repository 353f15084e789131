"""The gradient of a bias: the sums of a matrix's columns, as an operator of torch, so that a compiler sees one node."""

import torch
from torch import Tensor

from mmrec.ops.registration import register, runs_kernel


def _forward(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.stride(1) == 1 and runs_kernel(x, torch.promote_types(x.dtype, torch.float32)):
        from mmrec.ops.sums import launch_column_sum  # Triton exists on Linux alone

        return launch_column_sum(x, dtype)
    return x.sum(0, dtype=dtype)


column_sum_op = register(
    "column_sum(Tensor x, ScalarType dtype) -> Tensor", _forward, lambda x, dtype: x.new_empty(x.shape[1], dtype=dtype)
)


def column_sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums (C,) of a matrix (N, C) over its rows, in `dtype`, added up in fp32 or wider. Not differentiable."""
    total: Tensor = column_sum_op(x, dtype)
    return total
