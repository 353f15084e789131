"""Triton kernel between passes of `gated_scan` over segments of a sequence: from what they left, the state that each should start from."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["S", "D"])
def chain_kernel(
    used_ptr,
    left_ptr,
    product_ptr,
    h0_ptr,
    starts_ptr,
    h_last_ptr,
    wanted_ptr,
    S,
    D,
    h0_stride_B,
    h0_stride_D,
    FIRST: tl.constexpr,
    TOLERANCE: tl.constexpr,
    BD: tl.constexpr,
):
    """A step of Newton's method over segments: `h_{s+1} = left_s + product_s (h_s − used_s)`, from h0 to h_last.

    `used`, `left`, `product`, `starts` are (B, S, D), contiguous: what each segment started from and left, and ∂left/∂used. A channel is
    `wanted`, (B, D) int32, while the states its segments started from are off by more than TOLERANCE of its largest, or not finite.
    FIRST: all channels are looked at, and later those that are still wanted.
    """
    stripes = tl.cdiv(D, BD)
    batch = (tl.program_id(0) // stripes).to(tl.int64)
    channel = (tl.program_id(0) % stripes) * BD + tl.arange(0, BD).to(tl.int64)
    inside = channel < D
    if not FIRST:
        inside = inside & (tl.load(wanted_ptr + batch * D + channel, mask=inside, other=0) != 0)
    h = tl.zeros([BD], tl.float32)
    if h0_ptr is not None:
        h = tl.load(h0_ptr + batch * h0_stride_B + channel * h0_stride_D, mask=inside, other=0.0).to(tl.float32)
    missed = tl.zeros([BD], tl.float32)
    largest = tl.zeros([BD], tl.float32)
    for segment in range(0, S):
        place = (batch * S + segment) * D + channel
        difference = h - tl.load(used_ptr + place, mask=inside, other=0.0)
        tl.store(starts_ptr + place, h, mask=inside)
        missed = tl.maximum(missed, tl.where(difference == difference, tl.abs(difference), float("inf")))
        largest = tl.maximum(largest, tl.abs(h))
        h = tl.load(left_ptr + place, mask=inside, other=0.0) + tl.load(product_ptr + place, mask=inside, other=0.0) * difference
    found = (missed <= largest * TOLERANCE) & (missed < float("inf"))
    tl.store(wanted_ptr + batch * D + channel, tl.where(found, 0, 1), mask=inside)
    tl.store(h_last_ptr + batch * D + channel, h, mask=inside)
