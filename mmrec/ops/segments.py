"""Long sequences cut in time: segments that run side by side, as if they were sequences of their own, where few programs would walk."""

from collections.abc import Sequence

from torch import Tensor

LEAST = 1024  # tokens of a segment: below, a walk is not long enough to be worth a second one


def count(time: int, work: int, limit: int, worth: int, tensors: Sequence[Tensor | None]) -> int:
    """Into how many segments to cut sequences of `time` tokens, a power of two; 1 where that is not worth while or would have to copy.

    Args:
        time: T.
        work: how much already runs side by side.
        limit: how much fills a GPU, in the same unit.
        worth: segments below which a cut costs more than it gains.
        tensors: (B, T, ...), what would be cut.
    """
    segments = 1
    while 2 * segments * work <= limit and time % (2 * segments) == 0 and time // (2 * segments) >= LEAST:
        segments *= 2
    if segments < worth:  # nearly every launch: nothing more to look at
        return 1
    adjacent = all(t is None or t.shape[0] == 1 or t.stride(0) == time * t.stride(1) for t in tensors)
    return segments if adjacent else 1


def cut(tensor: Tensor, segments: int) -> Tensor:
    """(B, T, ...) as (B · S, T / S, ...), a view: `count` has looked at the strides."""
    batch, time = tensor.shape[:2]
    shape = (batch * segments, time // segments, *tensor.shape[2:])
    stride = (time // segments * tensor.stride(1), tensor.stride(1), *tensor.stride()[2:])
    return tensor.as_strided(shape, stride, tensor.storage_offset())
