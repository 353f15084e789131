"""Device functions that the elementwise scans share.

A tile of `R · G` tokens by `BD` channels lies in registers as G tensors [R, BD]: row r of tensor j is token `r·G + j` of the tile, so
that a thread holds G consecutive tokens of its channels. It folds them in registers; only one value a group crosses threads, here.
The functions know no direction: a backward numbers its rows from the last token.

Written with Triton's language alone, so that kernels compile without the rest of the package.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _compose(first_a, first_h, before_a, before_h, second_a, second_h, inner_a, inner_h):
    """Maps `h → a·h + b` of neighbouring ranges, each with the map of "all but its last group"."""
    return (
        first_a * second_a,
        second_a * first_h + second_h,
        first_a * inner_a,
        inner_a * first_h + inner_h,
    )


@triton.jit
def _append(first, before, second, inner):
    """The same for plain sums."""
    return first + second, first + inner


@triton.jit
def maps_before(a_RD, h_RD):
    """The map from a tile's entry to each group's entry: exclusive scan over axis 0 of the groups' maps `h → a·h + b`.

    Args:
        a_RD: product of a group's decays.
        h_RD: what the group leaves when it starts from zero.

    Returns:
        Its `a` and `b`; group r starts from `a·carry + b`.
    """
    _, _, before_a, before_h = tl.associative_scan((a_RD, h_RD, tl.full(a_RD.shape, 1.0, a_RD.dtype), tl.zeros_like(h_RD)), 0, _compose)
    return before_a, before_h


@triton.jit
def sums_before(s_RD):
    """The sum of all earlier groups: exclusive scan over axis 0, in the dtype of `s_RD` (float32 or float64)."""
    _, before = tl.associative_scan((s_RD, tl.zeros_like(s_RD)), 0, _append)
    return before


@triton.jit
def last_group(x_RD, R: tl.constexpr):
    """Row R − 1 as [BD]: the state that leaves a tile."""
    is_last = tl.arange(0, R) == R - 1
    return tl.sum(tl.where(is_last[:, None], x_RD, 0), axis=0)


@triton.jit
def load_starts(reset_ptr, stride_T, first_row, T, R: tl.constexpr, G: tl.constexpr, REVERSED: tl.constexpr):
    """The reset mask of a tile, [R, G], nothing past the last row. Single bytes cannot be copied asynchronously: load a tile ahead.

    Args:
        reset_ptr: the sequence's (T,) mask.
        first_row: the tile's first row; with REVERSED row 0 is token T − 1.
    """
    row = first_row + tl.arange(0, R)[:, None] * G + tl.arange(0, G)[None, :]
    token = T - 1 - row if REVERSED else row
    return tl.load(reset_ptr + token.to(tl.int64) * stride_T, mask=row < T, other=0)


@triton.jit
def starts_as_bits(starts_RG, G: tl.constexpr):
    """The same as [R, 1] integers, bit j for the group's j-th row: what fits the registers of a tile's tensors [R, BD]."""
    return tl.sum((starts_RG != 0).to(tl.int32) << tl.arange(0, G)[None, :], axis=1)[:, None]
