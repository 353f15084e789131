"""Sums over tokens of what would be too large for all of them at once, as logits are."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def sum_over_chunks(function: Callable[..., Tensor], *tensors: Tensor, size: int) -> Tensor:
    """`function(*tensors)`, a sum over their rows, of so many rows at a time; each chunk's is computed again in the backward.

    Args:
        function: of rows of the tensors, to a 0-dim sum.
        tensors: all with the same number of rows.
        size: rows of a chunk.
    """
    chunks = list(zip(*(tensor.split(size) for tensor in tensors), strict=True))
    if len(chunks) == 1:  # to compute it twice would save nothing
        return function(*tensors)
    # Nothing is drawn, and within a CUDA graph no random state could be read.
    sums = (checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks)
    return functools.reduce(torch.add, sums)
