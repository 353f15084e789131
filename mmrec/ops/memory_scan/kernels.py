"""Triton kernels of `memory_scan`: the walk over chunks, the read-out from stored memories, one token (derived in README.md).

Dimension letters: C tokens of a chunk, N chunks, K and V the widths of a head. A *reader* takes something out of the memory, a *writer*
puts something in: forward, q reads and k, v write; in the backward, time runs the other way, k reads dM and q, dr write it.
"""

import triton
import triton.language as tl


@triton.jit
def wide(index):
    """An index in 64 bits: times a stride it passes 2³¹ at T = 131072."""
    return tl.full((), 0, tl.int64) + index  # not `.to`: under the interpreter a loop's variable is a Python number


@triton.jit
def locate(share, H):
    """Which of `share` programs of a head this one is, its batch, its head, and both in one number, the last three in 64 bits.

    All in one axis of the grid: CUDA counts the others to 65,535 only.
    """
    batch_head = tl.program_id(0) // share
    return tl.program_id(0) % share, (batch_head // H).to(tl.int64), (batch_head % H).to(tl.int64), batch_head.to(tl.int64)


@triton.jit
def _row_mask(rows, limit, column0, WIDTH: tl.constexpr, W: tl.constexpr):
    """Rows below the limit; of the columns only what a compiler cannot know: whether the last block is full."""
    mask = (rows < limit)[:, None]
    if WIDTH % W:
        mask = mask & (column0 + tl.arange(0, W) < WIDTH)[None, :]
    return mask


@triton.jit
def load_rows(ptr, first, stride_row, stride_column, limit, column0, WIDTH: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """(R, W) elements from row `first` and column `column0` of a matrix (limit, WIDTH), zeros outside."""
    rows = first + tl.arange(0, R)
    columns = column0 + tl.arange(0, W).to(tl.int64)
    pointers = ptr + rows.to(tl.int64)[:, None] * stride_row + columns[None, :] * stride_column
    return tl.load(pointers, mask=_row_mask(rows, limit, column0, WIDTH, W), other=0.0)


@triton.jit
def store_rows(ptr, tile, first, stride_row, stride_column, limit, column0, WIDTH: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """The way back of `load_rows`."""
    rows = first + tl.arange(0, R)
    columns = column0 + tl.arange(0, W).to(tl.int64)
    pointers = ptr + rows.to(tl.int64)[:, None] * stride_row + columns[None, :] * stride_column
    tl.store(pointers, tile.to(ptr.dtype.element_ty), mask=_row_mask(rows, limit, column0, WIDTH, W))


@triton.jit
def _later(left, right):
    return tl.maximum(left, right)


@triton.jit
def load_decays(log_ptr, reset_ptr, first, stride_log, stride_reset, T, C: tl.constexpr, HAS_RESET: tl.constexpr):
    """Log-decays summed from the chunk's start, (C,), and where every token's document began, −1 if before the chunk; both at its end."""
    rows = first + tl.arange(0, C)
    log = tl.load(log_ptr + rows.to(tl.int64) * stride_log, mask=rows < T, other=0.0).to(tl.float32)
    g = tl.cumsum(log, 0)
    g_end = tl.sum(tl.where(tl.arange(0, C) == C - 1, g, 0.0), 0)
    if HAS_RESET:
        reset = tl.load(reset_ptr + rows.to(tl.int64) * stride_reset, mask=rows < T, other=0)
        begun = tl.where(reset != 0, rows, -1)
        start = tl.associative_scan(begun, 0, _later)
        start_end = tl.max(begun, 0)
    else:
        start = rows
        start_end = -1
    return g, start, g_end, start_end


@triton.jit
def initial_decay(g, start, HAS_RESET: tl.constexpr):
    """What is left of the chunk's initial memory where the log-decays sum to `g`."""
    if HAS_RESET:
        g = tl.where(start < 0, g, float("-inf"))
    return tl.exp(g)


@triton.jit
def final_decay(g, g_end, start_end, first, C: tl.constexpr, HAS_RESET: tl.constexpr):
    """What is left at the chunk's end of what each token wrote."""
    difference = g_end - g
    if HAS_RESET:
        difference = tl.where(first + tl.arange(0, C) >= start_end, difference, float("-inf"))
    return tl.exp(difference)


@triton.jit
def decay_within(g, start, first, C: tl.constexpr, HAS_RESET: tl.constexpr, READER_FIRST: tl.constexpr):
    """(C, C): what is left of what token j wrote when token i ≥ j reads it; rows are i, or j where not READER_FIRST."""
    rows = first + tl.arange(0, C)  # with `first` the comparison stays in the loop: hoisted, its results would occupy registers
    if READER_FIRST:
        difference = g[:, None] - g[None, :]
        visible = rows[:, None] >= rows[None, :]
        if HAS_RESET:
            visible = visible & (start[:, None] <= rows[None, :])
    else:
        difference = g[None, :] - g[:, None]
        visible = rows[:, None] <= rows[None, :]
        if HAS_RESET:
            visible = visible & (start[None, :] <= rows[:, None])
    # Masked before the exponential: on the other side of the diagonal it would overflow.
    return tl.exp(tl.where(visible, difference, float("-inf")))


@triton.jit(do_not_specialize=["T", "log_stride_b", "reset_stride_b"])
def walk_kernel(
    reader_ptr,
    writer_ptr,
    value_ptr,
    log_ptr,
    reset_ptr,
    initial_ptr,
    output_ptr,
    states_ptr,
    last_ptr,
    reader_stride_b,
    reader_stride_t,
    reader_stride_h,
    reader_stride_k,
    writer_stride_b,
    writer_stride_t,
    writer_stride_h,
    writer_stride_k,
    value_stride_b,
    value_stride_t,
    value_stride_h,
    value_stride_v,
    log_stride_b,
    log_stride_t,
    log_stride_h,
    reset_stride_b,
    reset_stride_t,
    initial_stride_b,
    initial_stride_h,
    initial_stride_k,
    initial_stride_v,
    output_stride_b,
    output_stride_t,
    output_stride_h,
    output_stride_v,
    last_stride_b,
    last_stride_h,
    last_stride_k,
    last_stride_v,
    T,
    H,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    HAS_STATES: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_RESET: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program carries a (BK, BV) block of one head's memory over all chunks, in the accumulators of the tensor cores.

    Forward: the memory, from M0 to M_last; the output is r. REVERSE: its gradient, from dM_last to dM0; the output is dv.
    HAS_OUTPUT needs the whole K in one block. HAS_STATES stores the state that enters each chunk, (B·H, N, K, V).
    """
    v_blocks: tl.constexpr = tl.cdiv(V, BV)
    part, batch, head, batch_head = locate(v_blocks * tl.cdiv(K, BK), H)
    v0 = (part % v_blocks) * BV
    k0 = 0 if HAS_OUTPUT else (part // v_blocks) * BK
    reader_ptr += batch * reader_stride_b + head * reader_stride_h
    writer_ptr += batch * writer_stride_b + head * writer_stride_h
    value_ptr += batch * value_stride_b + head * value_stride_h
    log_ptr += batch * log_stride_b + head * log_stride_h
    if HAS_RESET:
        reset_ptr += batch * reset_stride_b
    if HAS_OUTPUT:
        output_ptr += batch * output_stride_b + head * output_stride_h
    N = tl.cdiv(T, C)
    if HAS_STATES:
        states_ptr += batch_head * N * K * V

    state = tl.zeros((BK, BV), tl.float32)
    if HAS_INITIAL:
        initial_ptr += batch * initial_stride_b + head * initial_stride_h
        state += load_rows(initial_ptr, k0, initial_stride_k, initial_stride_v, K, v0, V, BK, BV).to(tl.float32)

    for step in tl.range(0, N, num_stages=STAGES):
        n = step
        if REVERSE:
            n = N - 1 - step
        first = n * C
        g, start, g_end, start_end = load_decays(log_ptr, reset_ptr, first, log_stride_t, reset_stride_t, T, C, HAS_RESET)
        from_start = initial_decay(g, start, HAS_RESET)
        to_end = final_decay(g, g_end, start_end, first, C, HAS_RESET)
        if REVERSE:
            read_weight = to_end
            write_weight = from_start * scale
        else:
            read_weight = from_start * scale
            write_weight = to_end
        writer = load_rows(writer_ptr, first, writer_stride_t, writer_stride_k, T, k0, K, C, BK).to(DOT)
        value = load_rows(value_ptr, first, value_stride_t, value_stride_v, T, v0, V, C, BV).to(DOT)
        if HAS_STATES:
            store_rows(states_ptr + wide(n) * K * V, state, k0, V, 1, K, v0, V, BK, BV)
        if HAS_OUTPUT:
            reader = load_rows(reader_ptr, first, reader_stride_t, reader_stride_k, T, k0, K, C, BK).to(DOT)
            scores = tl.dot(reader, tl.trans(writer), input_precision="ieee")
            scores *= decay_within(g, start, first, C, HAS_RESET, not REVERSE) * scale
            output = tl.dot(reader, state.to(DOT), input_precision="ieee") * read_weight[:, None]
            output = tl.dot(scores.to(DOT), value, output, input_precision="ieee")
            store_rows(output_ptr, output, first, output_stride_t, output_stride_v, T, v0, V, C, BV)
        weighted = (value.to(tl.float32) * write_weight[:, None]).to(DOT)
        state = tl.dot(tl.trans(writer), weighted, state * initial_decay(g_end, start_end, HAS_RESET), input_precision="ieee")

    last_ptr += batch * last_stride_b + head * last_stride_h
    store_rows(last_ptr, state, k0, last_stride_k, last_stride_v, K, v0, V, BK, BV)


@triton.jit(do_not_specialize=["T", "log_stride_b", "reset_stride_b"])
def output_kernel(
    reader_ptr,
    writer_ptr,
    value_ptr,
    log_ptr,
    reset_ptr,
    states_ptr,
    output_ptr,
    reader_stride_b,
    reader_stride_t,
    reader_stride_h,
    reader_stride_k,
    writer_stride_b,
    writer_stride_t,
    writer_stride_h,
    writer_stride_k,
    value_stride_b,
    value_stride_t,
    value_stride_h,
    value_stride_v,
    log_stride_b,
    log_stride_t,
    log_stride_h,
    reset_stride_b,
    reset_stride_t,
    output_stride_b,
    output_stride_t,
    output_stride_h,
    output_stride_v,
    T,
    H,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_RESET: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One chunk, one head, BV columns of the output, from the stored states: r, or (REVERSE) dv. For heads too wide for `walk_kernel`."""
    v_blocks: tl.constexpr = tl.cdiv(V, BV)
    N = tl.cdiv(T, C)
    part, batch, head, batch_head = locate(v_blocks * N, H)
    v0 = (part % v_blocks) * BV
    chunk = part // v_blocks
    first = chunk * C
    reader_ptr += batch * reader_stride_b + head * reader_stride_h
    writer_ptr += batch * writer_stride_b + head * writer_stride_h
    value_ptr += batch * value_stride_b + head * value_stride_h
    log_ptr += batch * log_stride_b + head * log_stride_h
    if HAS_RESET:
        reset_ptr += batch * reset_stride_b
    output_ptr += batch * output_stride_b + head * output_stride_h
    states_ptr += (batch_head * N + chunk) * K * V

    scores = tl.zeros((C, C), tl.float32)
    output = tl.zeros((C, BV), tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        reader = load_rows(reader_ptr, first, reader_stride_t, reader_stride_k, T, k0, K, C, BK).to(DOT)
        writer = load_rows(writer_ptr, first, writer_stride_t, writer_stride_k, T, k0, K, C, BK).to(DOT)
        state = load_rows(states_ptr, k0, V, 1, K, v0, V, BK, BV).to(DOT)
        scores = tl.dot(reader, tl.trans(writer), scores, input_precision="ieee")
        output = tl.dot(reader, state, output, input_precision="ieee")

    g, start, g_end, start_end = load_decays(log_ptr, reset_ptr, first, log_stride_t, reset_stride_t, T, C, HAS_RESET)
    if REVERSE:
        output *= final_decay(g, g_end, start_end, first, C, HAS_RESET)[:, None]
    else:
        output *= initial_decay(g, start, HAS_RESET)[:, None] * scale
    scores *= decay_within(g, start, first, C, HAS_RESET, not REVERSE) * scale
    value = load_rows(value_ptr, first, value_stride_t, value_stride_v, T, v0, V, C, BV).to(DOT)
    output = tl.dot(scores.to(DOT), value, output, input_precision="ieee")
    store_rows(output_ptr, output, first, output_stride_t, output_stride_v, T, v0, V, C, BV)


@triton.jit
def step_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    log_ptr,
    reset_ptr,
    initial_ptr,
    r_ptr,
    last_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_k,
    k_stride_b,
    k_stride_h,
    k_stride_k,
    v_stride_b,
    v_stride_h,
    v_stride_v,
    log_stride_b,
    log_stride_h,
    reset_stride_b,
    initial_stride_b,
    initial_stride_h,
    initial_stride_k,
    initial_stride_v,
    H,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_RESET: tl.constexpr,
):
    """One token: (K, BV) of a head's memory is read and written once, in blocks of BK rows; r and M_last are contiguous."""
    part, batch, head, batch_head = locate(tl.cdiv(V, BV), H)
    v0 = part * BV
    columns = v0 + tl.arange(0, BV).to(tl.int64)
    value = tl.load(v_ptr + batch * v_stride_b + head * v_stride_h + columns * v_stride_v, mask=columns < V, other=0.0).to(tl.float32)
    decay = tl.exp(tl.load(log_ptr + batch * log_stride_b + head * log_stride_h).to(tl.float32))
    if HAS_RESET:
        decay = tl.where(tl.load(reset_ptr + batch * reset_stride_b) != 0, 0.0, decay)
    q_ptr += batch * q_stride_b + head * q_stride_h
    k_ptr += batch * k_stride_b + head * k_stride_h
    if HAS_INITIAL:
        initial_ptr += batch * initial_stride_b + head * initial_stride_h
    last_ptr += batch_head * K * V
    read = tl.zeros((BV,), tl.float32)
    for k0 in tl.range(0, K, BK):
        rows = k0 + tl.arange(0, BK).to(tl.int64)
        query = tl.load(q_ptr + rows * q_stride_k, mask=rows < K, other=0.0).to(tl.float32)
        key = tl.load(k_ptr + rows * k_stride_k, mask=rows < K, other=0.0).to(tl.float32)
        state = key[:, None] * value[None, :]
        if HAS_INITIAL:
            state += load_rows(initial_ptr, k0, initial_stride_k, initial_stride_v, K, v0, V, BK, BV).to(tl.float32) * decay
        store_rows(last_ptr, state, k0, V, 1, K, v0, V, BK, BV)
        read += tl.sum(state * query[:, None], 0)
    tl.store(r_ptr + batch_head * V + columns, (read * scale).to(r_ptr.dtype.element_ty), mask=columns < V)
