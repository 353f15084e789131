"""Device functions of the passes that go over (B, T, H, K) once: a program takes M tokens of one head."""

from typing import Any

import triton
import triton.language as tl

from mmrec.ops.launching import power_of_two

# Of a program's tile: 32 a thread of four warps; half of it where a backward's many tensors would leave room for too few warps.
FORWARD, BACKWARD = 4096, 2048
# Tiles of a program of a backward with sums over tokens, one after another: the sums leave it once, and the next tile is on its way.
LOOP, STAGES = 4, 3


@triton.jit
def tile_of(T, H, M: tl.constexpr):
    """Batch, head and first token of a program, in 64 bits; heads vary fastest, so that neighbours read neighbouring memory."""
    head = tl.program_id(0) % H
    rest = tl.program_id(0) // H
    tiles = tl.cdiv(T, M)
    return (rest // tiles).to(tl.int64), head.to(tl.int64), ((rest % tiles) * M).to(tl.int64)


@triton.jit
def _pointers(ptr, batch, head, first, stride_b, stride_t, stride_h, stride_k, M: tl.constexpr, BK: tl.constexpr):
    rows = first + tl.arange(0, M)
    columns = tl.arange(0, BK).to(tl.int64)
    return ptr + batch * stride_b + head * stride_h + rows[:, None] * stride_t + columns[None, :] * stride_k


@triton.jit
def _inside(first, T, K, M: tl.constexpr, BK: tl.constexpr):
    return (first + tl.arange(0, M) < T)[:, None] & (tl.arange(0, BK) < K)[None, :]


@triton.jit
def load_tile(ptr, batch, head, first, stride_b, stride_t, stride_h, stride_k, T, K, M: tl.constexpr, BK: tl.constexpr):
    """(M, BK) in fp32, zeros outside."""
    pointers = _pointers(ptr, batch, head, first, stride_b, stride_t, stride_h, stride_k, M, BK)
    return tl.load(pointers, mask=_inside(first, T, K, M, BK), other=0.0).to(tl.float32)


@triton.jit
def store_tile(ptr, x, batch, head, first, stride_b, stride_t, stride_h, stride_k, T, K, M: tl.constexpr, BK: tl.constexpr):
    """The way back of `load_tile`, in the tensor's dtype."""
    pointers = _pointers(ptr, batch, head, first, stride_b, stride_t, stride_h, stride_k, M, BK)
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=_inside(first, T, K, M, BK))


def tokens_and_warps(time: int, width: int, elements: int = FORWARD) -> dict[str, Any]:
    """Tile (M, BK) of a program by the sequence's length and the heads' width, with `num_warps`."""
    columns = power_of_two(width)
    tokens = max(1, min(elements // columns, power_of_two(time)))
    return {"M": tokens, "BK": columns, "num_warps": 4 if tokens * columns >= 1024 else 1}


def tiles_and_warps(time: int, width: int) -> dict[str, Any]:
    """The same for a backward whose program takes LOOP tiles one after another, STAGES of them on their way."""
    return {"LOOP": LOOP, "STAGES": STAGES} | tokens_and_warps(time, width, BACKWARD)
