"""Long sequences with few heads: segments of a sequence side by side, as if they were sequences of their own.

A walk over the chunks keeps one program a block of memory busy, whatever the length; with few sequences and heads most of the GPU waits.
Each segment is walked once from nothing, which gives what it leaves; these are chained (`chain_kernel`); then all segments run at once,
each from the memory that the chain found. That reads k and v, and in the backward q and dr, once more.
"""

import torch
from torch import Tensor

from mmrec.ops.launching import Call, blocks, launch, strides
from mmrec.ops.memory_scan.kernels_segments import chain_kernel

WALKS = 128  # sequences times heads that fill a GPU, where a head is 128 wide
LEAST = 1024  # tokens of a segment: below, a walk is not long enough to be worth a second one
_WORTH = 4  # segments: two would gain no more than their first walk costs
_BLOCK = 1024  # numbers of a memory that a program chains


def count(time: int, memories: int, tensors: tuple[Tensor | None, ...]) -> int:
    """Into how many segments to cut sequences of `time` tokens; 1 where there are memories enough, or where a cut would have to copy.

    Args:
        time: T.
        memories: blocks of 128 × 128 of all memories.
        tensors: (B, T, ...), what would be cut.
    """
    segments = 1
    while 2 * segments * memories <= WALKS and time % (2 * segments) == 0 and time // (2 * segments) >= LEAST:
        segments *= 2
    adjacent = all(t is None or t.shape[0] == 1 or t.stride(0) == time * t.stride(1) for t in tensors)
    return segments if adjacent and segments >= _WORTH else 1


def cut(tensor: Tensor, segments: int) -> Tensor:
    """(B, T, ...) as (B · S, T / S, ...), a view: `count` has looked at the strides."""
    batch, time = tensor.shape[:2]
    shape = (batch * segments, time // segments, *tensor.shape[2:])
    stride = (time // segments * tensor.stride(1), tensor.stride(1), *tensor.stride()[2:])
    return tensor.as_strided(shape, stride, tensor.storage_offset())


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
