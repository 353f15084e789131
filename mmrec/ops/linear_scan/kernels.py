"""Triton kernels of `linear_scan`: a program walks all of time for a stripe of channels, tile by tile (see the README)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrec.ops.launching import Call, blocks, launch, strides
from mmrec.ops.primitives import LOG2E, last_group, load_starts, maps_before, starts_as_bits
from mmrec.ops.tuning import launch_options


@triton.jit
def decay_of(log_a, bits, j: tl.constexpr, HAS_RESET: tl.constexpr):
    """`a_t`, 0 where a document starts."""
    decay = tl.exp2(log_a.to(tl.float32) * LOG2E)
    if HAS_RESET:
        decay = tl.where((bits >> j) & 1 != 0, 0.0, decay)
    return decay


@triton.jit
def load_row(pointers, row, left, in_D, WHOLE: tl.constexpr, EVEN: tl.constexpr):
    """One row of every group, [R, BD], zeros past `left` rows. A mask in the loop costs registers: none where all is inside."""
    if WHOLE and EVEN:
        return tl.load(pointers, eviction_policy="evict_first")
    elif WHOLE:
        return tl.load(pointers, mask=in_D[None, :], other=0, eviction_policy="evict_first")
    else:
        return tl.load(pointers, mask=(row < left) & in_D[None, :], other=0, eviction_policy="evict_first")


@triton.jit
def store_row(pointers, values, row, left, in_D, WHOLE: tl.constexpr, EVEN: tl.constexpr):
    """The way back of `load_row`."""
    if WHOLE and EVEN:
        tl.store(pointers, values.to(pointers.dtype.element_ty))
    elif WHOLE:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=in_D[None, :])
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=(row < left) & in_D[None, :])


@triton.jit
def forward_tile(
    x_tile,
    log_a_tile,
    h_tile,
    carry,
    bits,
    left,
    in_D,
    x_stride_T: tl.constexpr,
    log_a_stride_T: tl.constexpr,
    h_stride_T: tl.constexpr,
    HAS_RESET: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    """Scan a tile, all of it or (not WHOLE) `left` rows; the state that leaves it."""
    group = tl.arange(0, R)[:, None] * G
    x_tile += tl.arange(0, R).to(tl.int64)[:, None] * (G * x_stride_T)
    log_a_tile += tl.arange(0, R).to(tl.int64)[:, None] * (G * log_a_stride_T)
    h_tile += tl.arange(0, R).to(tl.int64)[:, None] * (G * h_stride_T)
    decays = ()
    xs = ()
    for j in tl.static_range(G):
        # Rows past the end: a = 1, x = 0, which carries the state on.
        log_a = load_row(log_a_tile + j * log_a_stride_T, group + j, left, in_D, WHOLE, EVEN)
        x = load_row(x_tile + j * x_stride_T, group + j, left, in_D, WHOLE, EVEN)
        decays = decays + (decay_of(log_a, bits, j, HAS_RESET),)
        xs = xs + (x.to(tl.float32),)
    group_a = decays[0]
    group_h = xs[0]
    for j in tl.static_range(1, G):
        group_a *= decays[j]
        group_h = decays[j] * group_h + xs[j]
    before_a, before_h = maps_before(group_a, group_h)
    h = before_a * carry[None, :] + before_h
    # Before the stores: the next tile waits for nothing else of this one.
    carry = last_group(group_a * h + group_h, R)
    for j in tl.static_range(G):
        h = decays[j] * h + xs[j]
        store_row(h_tile + j * h_stride_T, h, group + j, left, in_D, WHOLE, EVEN)
    return carry


@triton.jit(do_not_specialize=["T", "reset_stride_B"])
def forward_kernel(
    x_ptr,
    log_a_ptr,
    h0_ptr,
    reset_ptr,
    h_ptr,
    h_last_ptr,
    T,
    D,
    x_stride_B,
    x_stride_D,
    log_a_stride_B,
    log_a_stride_D,
    h0_stride_B,
    h0_stride_D,
    reset_stride_B,
    reset_stride_T,
    h_stride_B,
    x_stride_T: tl.constexpr,
    log_a_stride_T: tl.constexpr,
    h_stride_T: tl.constexpr,
    HAS_H0: tl.constexpr,
    HAS_RESET: tl.constexpr,
    EVEN: tl.constexpr,
    BD: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Strides of time are constants, so that a tile's rows are offsets within instructions. EVEN: D is a multiple of BD."""
    stripes = tl.cdiv(D, BD)
    sequence = (tl.program_id(0) // stripes).to(tl.int64)
    channel = (tl.program_id(0) % stripes) * BD + tl.arange(0, BD)
    in_D = channel < D
    column = channel.to(tl.int64)[None, :]
    x_ptr += sequence * x_stride_B + column * x_stride_D
    log_a_ptr += sequence * log_a_stride_B + column * log_a_stride_D
    h_ptr += sequence * h_stride_B + column
    carry = tl.zeros([BD], tl.float32)
    if HAS_H0:
        carry = tl.load(h0_ptr + sequence * h0_stride_B + channel * h0_stride_D, mask=in_D, other=0).to(tl.float32)
    if HAS_RESET:
        reset_ptr += sequence * reset_stride_B
        starts = load_starts(reset_ptr, reset_stride_T, 0, T, R, G, False)
    whole = T // (R * G) * (R * G)
    for first_row in tl.range(0, whole, R * G, num_stages=STAGES):
        bits = 0
        if HAS_RESET:
            bits = starts_as_bits(starts, G)
            starts = load_starts(reset_ptr, reset_stride_T, first_row + R * G, T, R, G, False)
        token = tl.cast(first_row, tl.int64)
        x_tile, log_a_tile, h_tile = x_ptr + token * x_stride_T, log_a_ptr + token * log_a_stride_T, h_ptr + token * h_stride_T
        carry = forward_tile(
            x_tile, log_a_tile, h_tile, carry, bits, R * G, in_D, x_stride_T, log_a_stride_T, h_stride_T, HAS_RESET, True, EVEN, R, G
        )
    if whole < T:
        bits = 0
        if HAS_RESET:
            bits = starts_as_bits(starts, G)
        token = tl.cast(whole, tl.int64)
        x_tile, log_a_tile, h_tile = x_ptr + token * x_stride_T, log_a_ptr + token * log_a_stride_T, h_ptr + token * h_stride_T
        carry = forward_tile(
            x_tile, log_a_tile, h_tile, carry, bits, T - whole, in_D, x_stride_T, log_a_stride_T, h_stride_T, HAS_RESET, False, EVEN, R, G
        )
    tl.store(h_last_ptr + sequence * D + channel, carry, mask=in_D)


@triton.jit
def backward_tile(
    dh_tile,
    before_tile,
    log_a_tile,
    dx_tile,
    dlog_a_tile,
    carry,
    bits,
    left,
    in_D,
    dh_stride_T: tl.constexpr,
    h_stride_T: tl.constexpr,
    log_a_stride_T: tl.constexpr,
    dx_stride_T: tl.constexpr,
    dlog_a_stride_T: tl.constexpr,
    HAS_RESET: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    """The scan of `f_t = a_t g_t` over a tile, row r a token before row r − 1; where not WHOLE, of `left` rows up to the first token.

    `before_tile` is the state before row 0; the first token's lies elsewhere, and its `dlog_a` is not written.
    """
    group = tl.arange(0, R)[:, None] * G
    dh_tile -= tl.arange(0, R).to(tl.int64)[:, None] * (G * dh_stride_T)
    before_tile -= tl.arange(0, R).to(tl.int64)[:, None] * (G * h_stride_T)
    log_a_tile -= tl.arange(0, R).to(tl.int64)[:, None] * (G * log_a_stride_T)
    dx_tile -= tl.arange(0, R).to(tl.int64)[:, None] * (G * dx_stride_T)
    dlog_a_tile -= tl.arange(0, R).to(tl.int64)[:, None] * (G * dlog_a_stride_T)
    decays = ()
    dhs = ()
    befores = ()
    for j in tl.static_range(G):
        # Rows past the first token: a = 1, dh = 0, which carries f on.
        log_a = load_row(log_a_tile - j * log_a_stride_T, group + j, left, in_D, WHOLE, EVEN)
        dh = load_row(dh_tile - j * dh_stride_T, group + j, left, in_D, WHOLE, EVEN)
        befores = befores + (load_row(before_tile - j * h_stride_T, group + j, left - 1, in_D, WHOLE, EVEN),)
        decays = decays + (decay_of(log_a, bits, j, HAS_RESET),)
        dhs = dhs + (dh.to(tl.float32),)
    group_a = decays[0]
    group_f = decays[0] * dhs[0]
    for j in tl.static_range(1, G):
        group_a *= decays[j]
        group_f = decays[j] * (group_f + dhs[j])
    before_a, before_f = maps_before(group_a, group_f)
    f = before_a * carry[None, :] + before_f
    carry = last_group(group_a * f + group_f, R)
    for j in tl.static_range(G):
        g = f + dhs[j]
        f = decays[j] * g
        store_row(dx_tile - j * dx_stride_T, g, group + j, left, in_D, WHOLE, EVEN)
        store_row(dlog_a_tile - j * dlog_a_stride_T, f * befores[j].to(tl.float32), group + j, left - 1, in_D, WHOLE, EVEN)
    return carry


@triton.jit(do_not_specialize=["T", "reset_stride_B"])
def backward_kernel(
    dh_ptr,
    dh_last_ptr,
    h_ptr,
    log_a_ptr,
    h0_ptr,
    reset_ptr,
    dx_ptr,
    dlog_a_ptr,
    dh0_ptr,
    T,
    D,
    dh_stride_B,
    dh_stride_D,
    dh_last_stride_B,
    dh_last_stride_D,
    h_stride_B,
    h_stride_D,
    log_a_stride_B,
    log_a_stride_D,
    h0_stride_B,
    h0_stride_D,
    reset_stride_B,
    reset_stride_T,
    dx_stride_B,
    dx_stride_D,
    dlog_a_stride_B,
    dlog_a_stride_D,
    dh0_stride_B,
    dh0_stride_D,
    dh_stride_T: tl.constexpr,
    h_stride_T: tl.constexpr,
    log_a_stride_T: tl.constexpr,
    dx_stride_T: tl.constexpr,
    dlog_a_stride_T: tl.constexpr,
    HAS_DH_LAST: tl.constexpr,
    HAS_H0: tl.constexpr,
    HAS_RESET: tl.constexpr,
    EVEN: tl.constexpr,
    BD: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The same scan with time reversed: row r is token T − 1 − r."""
    stripes = tl.cdiv(D, BD)
    sequence = (tl.program_id(0) // stripes).to(tl.int64)
    channel = (tl.program_id(0) % stripes) * BD + tl.arange(0, BD)
    in_D = channel < D
    column = channel.to(tl.int64)[None, :]
    dh_ptr += sequence * dh_stride_B + column * dh_stride_D
    h_ptr += sequence * h_stride_B + column * h_stride_D
    log_a_ptr += sequence * log_a_stride_B + column * log_a_stride_D
    dx_ptr += sequence * dx_stride_B + column * dx_stride_D
    dlog_a_ptr += sequence * dlog_a_stride_B + column * dlog_a_stride_D
    carry = tl.zeros([BD], tl.float32)
    if HAS_DH_LAST:
        carry = tl.load(dh_last_ptr + sequence * dh_last_stride_B + channel * dh_last_stride_D, mask=in_D, other=0).to(tl.float32)
    if HAS_RESET:
        reset_ptr += sequence * reset_stride_B
        starts = load_starts(reset_ptr, reset_stride_T, 0, T, R, G, True)
    whole = (T - 1) // (R * G) * (R * G)  # but the first token's tile: what lies before it is in another tensor
    for first_row in tl.range(0, whole, R * G, num_stages=STAGES):
        bits = 0
        if HAS_RESET:
            bits = starts_as_bits(starts, G)
            starts = load_starts(reset_ptr, reset_stride_T, first_row + R * G, T, R, G, True)
        token = (T - 1 - first_row).to(tl.int64)
        carry = backward_tile(
            dh_ptr + token * dh_stride_T, h_ptr + (token - 1) * h_stride_T, log_a_ptr + token * log_a_stride_T,
            dx_ptr + token * dx_stride_T, dlog_a_ptr + token * dlog_a_stride_T, carry, bits, R * G, in_D,
            dh_stride_T, h_stride_T, log_a_stride_T, dx_stride_T, dlog_a_stride_T, HAS_RESET, True, EVEN, R, G,
        )  # fmt: skip
    bits = 0
    if HAS_RESET:
        bits = starts_as_bits(starts, G)
    token = (T - 1 - whole).to(tl.int64)
    carry = backward_tile(
        dh_ptr + token * dh_stride_T, h_ptr + (token - 1) * h_stride_T, log_a_ptr + token * log_a_stride_T,
        dx_ptr + token * dx_stride_T, dlog_a_ptr + token * dlog_a_stride_T, carry, bits, T - whole, in_D,
        dh_stride_T, h_stride_T, log_a_stride_T, dx_stride_T, dlog_a_stride_T, HAS_RESET, False, EVEN, R, G,
    )  # fmt: skip
    tl.store(dh0_ptr + sequence * dh0_stride_B + channel * dh0_stride_D, carry.to(dh0_ptr.dtype.element_ty), mask=in_D)
    # The first token's state before is h0, in another tensor: its row, which no tile wrote.
    dlog_a = tl.zeros([BD], tl.float32)
    if HAS_H0:
        dlog_a = carry * tl.load(h0_ptr + sequence * h0_stride_B + channel * h0_stride_D, mask=in_D, other=0).to(tl.float32)
    tl.store(dlog_a_ptr, dlog_a.to(dlog_a_ptr.dtype.element_ty)[None, :], mask=in_D[None, :])


def shape_class(batch: int, channels: int) -> str:
    """By B·D: `few` up to one stripe of 32 channels a multiprocessor of a large GPU, `some` up to one of 64, `many` above."""
    return "few" if batch * channels <= 32 * 132 else "some" if batch * channels <= 64 * 132 else "many"


def launch_forward(x: Tensor, log_a: Tensor, h0: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """`h` (B, T, D) in the dtype of `x` and `h_last` (B, D) fp32; inputs with any strides."""
    batch, time, channels = x.shape
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h_last = torch.empty((batch, channels), dtype=torch.float32, device=x.device)

    def prepare() -> Call:
        options = launch_options("linear_scan.forward", shape_class(batch, channels), x.device)
        inputs = (*x.stride()[::2], *log_a.stride()[::2], *strides(h0, 2), *strides(reset, 2))
        constants = {"x_stride_T": x.stride(1), "log_a_stride_T": log_a.stride(1), "h_stride_T": h.stride(1)}
        flags = {**constants, "HAS_H0": h0 is not None, "HAS_RESET": reset is not None, "EVEN": channels % options["BD"] == 0}
        return Call((batch * blocks(channels, options["BD"]),), (time, channels, *inputs, h.stride(0)), flags | options)

    launch(forward_kernel, (x, log_a, h0, reset, h, h_last), prepare)
    return h, h_last


def launch_backward(
    dh: Tensor,
    dh_last: Tensor | None,
    h: Tensor,
    log_a: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    dx: Tensor,
    dlog_a: Tensor,
    dh0: Tensor,
) -> None:
    """Write the gradients into `dx`, `dlog_a` (B, T, D) and `dh0` (B, D): views of any dtype and strides."""
    batch, time, channels = dh.shape

    def prepare() -> Call:
        options = launch_options("linear_scan.backward", shape_class(batch, channels), dh.device)
        gates = (*h.stride()[::2], *log_a.stride()[::2])
        inputs = (*dh.stride()[::2], *strides(dh_last, 2), *gates, *strides(h0, 2), *strides(reset, 2))
        outputs = (*dx.stride()[::2], *dlog_a.stride()[::2], *dh0.stride())
        over_time = {"dh": dh, "h": h, "log_a": log_a, "dx": dx, "dlog_a": dlog_a}
        flags = {f"{name}_stride_T": tensor.stride(1) for name, tensor in over_time.items()} | {
            "HAS_DH_LAST": dh_last is not None,
            "HAS_H0": h0 is not None,
            "HAS_RESET": reset is not None,
            "EVEN": channels % options["BD"] == 0,
        }
        return Call((batch * blocks(channels, options["BD"]),), (time, channels, *inputs, *outputs), flags | options)

    launch(backward_kernel, (dh, dh_last, h, log_a, h0, reset, dx, dlog_a, dh0), prepare)
