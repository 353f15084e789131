"""Long sequences with few heads: segments of a sequence side by side, as if they were sequences of their own.

A walk over the chunks keeps one program a block of memory busy, whatever the length; with few sequences and heads most of the GPU waits.
Each segment is walked once from nothing, which gives what it leaves; these are chained (`chain_kernel`); then all segments run at once,
each from the memory that the chain found. That reads k and v once more, and in the backward q and dr; k and v there too, if the forward
did not keep its memories.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmrec.ops.launching import Call, blocks, launch, strides
from mmrec.ops.memory_scan.kernels_segments import chain_kernel
from mmrec.ops.segments import count

WALKS = 128  # sequences times heads that fill a GPU, where a head is 128 wide
_WORTH = 8  # segments: two would gain no more than their first walk costs; from 32 memories on only the uncut walk was ever timed
_BLOCK = 1024  # numbers of a memory that a program chains


def segments_of(time: int, memories: int, tensors: Sequence[Tensor | None]) -> int:
    """Into how many segments `tensors`, (B, T, ...), are cut; `memories`: blocks of 128 × 128 of all memories. See `segments.count`."""
    return count(time, memories, WALKS, _WORTH, tensors)


def log_decays(log_alpha: Tensor, reset: Tensor | None, segments: int) -> Tensor:
    """What is left of a memory after each segment, as a logarithm, (B, S, H) fp32: nothing, −∞, where a document starts in it."""
    summed = log_alpha.unflatten(1, (segments, -1)).sum(2, dtype=torch.float32)
    if reset is None:
        return summed
    return summed.masked_fill(reset.unflatten(1, (segments, -1)).any(2).unsqueeze(-1), float("-inf"))


def chain(left: Tensor, log_decay: Tensor, initial: Tensor | None, last: Tensor, reverse: bool) -> Tensor:
    """The memory that enters each segment, (B · S, H, K, V) fp32, contiguous.

    Args:
        left: (B · S, H, K, V) fp32, contiguous: what each segment leaves when it starts from nothing.
        log_decay: from `log_decays`.
        initial: (B, H, K, V), before the first segment (reversed, after the last); None: nothing.
        last: (B, H, K, V), gets the memory after the last (reversed, before the first).
        reverse: whether time runs backwards.
    """
    batch, segments, heads = log_decay.shape
    key_width, value_width = left.shape[-2:]
    starts = torch.empty_like(left)

    def prepare() -> Call:
        grid = (batch * heads * blocks(key_width * value_width, _BLOCK),)
        numbers = (segments, heads, *strides(initial, 4), *last.stride())
        return Call(grid, numbers, {"K": key_width, "V": value_width, "BLOCK": _BLOCK, "REVERSE": reverse, "num_warps": 4})

    launch(chain_kernel, (left, log_decay, initial, starts, last), prepare, reverse)
    return starts
