"""Triton kernel between passes of `gated_scan` over segments of a sequence: from what they left, what each should start from."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["S", "D"])
def chain_kernel(
    left_ptr,
    product_ptr,
    used_ptr,
    first_ptr,
    starts_ptr,
    last_ptr,
    wanted_ptr,
    S,
    D,
    first_stride_B,
    first_stride_D,
    last_stride_B,
    last_stride_D,
    ALL: tl.constexpr,
    REVERSE: tl.constexpr,
    TOLERANCE: tl.constexpr,
    BD: tl.constexpr,
):
    """A step of Newton's method over segments, `h_{s+1} = left_s + product_s (h_s − used_s)`, from `first`, or zeros, to `last`.

    `left`, `product`, `used`, `starts` are (B, S, D), contiguous fp32: what each segment left, ∂left/∂used, what it started from and what
    it should start from. Without `used` the segments are linear and started from zeros; REVERSE runs from the last segment.
    A channel is `wanted`, (B, D) int32, while the states its segments started from are off by more than TOLERANCE of its largest, or not
    finite. ALL channels are looked at, or those that are still wanted.
    """
    stripes = tl.cdiv(D, BD)
    batch = (tl.program_id(0) // stripes).to(tl.int64)
    channel = (tl.program_id(0) % stripes) * BD + tl.arange(0, BD).to(tl.int64)
    inside = channel < D
    if not ALL:
        inside = inside & (tl.load(wanted_ptr + batch * D + channel, mask=inside, other=0) != 0)
    h = tl.zeros([BD], tl.float32)
    if first_ptr is not None:
        h = tl.load(first_ptr + batch * first_stride_B + channel * first_stride_D, mask=inside, other=0.0).to(tl.float32)
    missed = tl.zeros([BD], tl.float32)
    largest = tl.zeros([BD], tl.float32)
    for step in range(0, S):
        segment = S - 1 - step if REVERSE else step
        place = (batch * S + segment) * D + channel
        difference = h
        if used_ptr is not None:
            difference = h - tl.load(used_ptr + place, mask=inside, other=0.0)
        tl.store(starts_ptr + place, h, mask=inside)
        missed = tl.maximum(missed, tl.where(difference == difference, tl.abs(difference), float("inf")))
        largest = tl.maximum(largest, tl.abs(h))
        h = tl.load(left_ptr + place, mask=inside, other=0.0) + tl.load(product_ptr + place, mask=inside, other=0.0) * difference
    if wanted_ptr is not None:
        found = (missed <= largest * TOLERANCE) & (missed < float("inf"))
        tl.store(wanted_ptr + batch * D + channel, tl.where(found, 0, 1), mask=inside)
    tl.store(last_ptr + batch * last_stride_B + channel * last_stride_D, h.to(last_ptr.dtype.element_ty), mask=inside)
