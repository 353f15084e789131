"""Triton kernel of `memory_scan`: from what each segment of a sequence leaves when it starts from nothing, the memory each starts from."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["S"])
def chain_kernel(
    left_ptr,
    log_decay_ptr,
    initial_ptr,
    starts_ptr,
    last_ptr,
    S,
    H,
    initial_stride_b,
    initial_stride_h,
    initial_stride_k,
    initial_stride_v,
    last_stride_b,
    last_stride_h,
    last_stride_k,
    last_stride_v,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """`M_{s+1} = α_s M_s + left_s` over S segments, a block of one head's memory a program; REVERSE runs from the last segment.

    `left` and `starts` are (B, S, H, K, V), `log_decay` (B, S, H), contiguous; `starts` gets the memory that enters each segment.
    """
    parts: tl.constexpr = tl.cdiv(K * V, BLOCK)
    batch_head = tl.program_id(0) // parts
    batch, head = (batch_head // H).to(tl.int64), (batch_head % H).to(tl.int64)
    element = (tl.program_id(0) % parts) * BLOCK + tl.arange(0, BLOCK)
    inside = element < K * V
    row, column = (element // V).to(tl.int64), (element % V).to(tl.int64)
    state = tl.zeros((BLOCK,), tl.float32)
    if initial_ptr is not None:
        source = initial_ptr + batch * initial_stride_b + head * initial_stride_h + row * initial_stride_k + column * initial_stride_v
        state = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    for step in range(0, S):
        segment = batch * S + (S - 1 - step if REVERSE else step)
        place = (segment * H + head) * K * V + element
        tl.store(starts_ptr + place, state, mask=inside)
        decay = tl.exp(tl.load(log_decay_ptr + segment * H + head))
        state = decay * state + tl.load(left_ptr + place, mask=inside, other=0.0)
    target = last_ptr + batch * last_stride_b + head * last_stride_h + row * last_stride_k + column * last_stride_v
    tl.store(target, state.to(last_ptr.dtype.element_ty), mask=inside)
