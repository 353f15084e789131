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
    x_stride_T,
    x_stride_D,
    log_a_stride_B,
    log_a_stride_T,
    log_a_stride_D,
    h0_stride_B,
    h0_stride_D,
    reset_stride_B,
    reset_stride_T,
    h_stride_B,
    h_stride_T,
    HAS_H0: tl.constexpr,
    HAS_RESET: tl.constexpr,
    BD: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    STAGES: tl.constexpr,
):
    stripes = tl.cdiv(D, BD)
    sequence = (tl.program_id(0) // stripes).to(tl.int64)
    channel = (tl.program_id(0) % stripes) * BD + tl.arange(0, BD)
    in_D = channel < D
    column = channel.to(tl.int64)[None, :]
    group = tl.arange(0, R)[:, None] * G
    x_ptr += sequence * x_stride_B + column * x_stride_D
    log_a_ptr += sequence * log_a_stride_B + column * log_a_stride_D
    h_ptr += sequence * h_stride_B + column
    carry = tl.zeros([BD], tl.float32)
    if HAS_H0:
        carry = tl.load(h0_ptr + sequence * h0_stride_B + channel * h0_stride_D, mask=in_D, other=0).to(tl.float32)
    if HAS_RESET:
        reset_ptr += sequence * reset_stride_B
        starts = load_starts(reset_ptr, reset_stride_T, 0, T, R, G, False)
    for first_row in tl.range(0, T, R * G, num_stages=STAGES):
        first_token = tl.cast(first_row, tl.int64)
        x_tile = x_ptr + first_token * x_stride_T
        log_a_tile = log_a_ptr + first_token * log_a_stride_T
        h_tile = h_ptr + first_token * h_stride_T
        bits = 0
        if HAS_RESET:
            bits = starts_as_bits(starts, G)
            starts = load_starts(reset_ptr, reset_stride_T, first_row + R * G, T, R, G, False)
        decays = ()
        xs = ()
        for j in tl.static_range(G):
            row = group + j
            inside = (row < T - first_row) & in_D[None, :]  # rows past the end: a = 1, x = 0, which carries the state on
            log_a = tl.load(log_a_tile + row * log_a_stride_T, mask=inside, other=0, eviction_policy="evict_first")
            x = tl.load(x_tile + row * x_stride_T, mask=inside, other=0, eviction_policy="evict_first")
            decays = decays + (decay_of(log_a, bits, j, HAS_RESET),)
            xs = xs + (x.to(tl.float32),)
        group_a = decays[0]
        group_h = xs[0]
        for j in tl.static_range(1, G):
            group_a *= decays[j]
            group_h = decays[j] * group_h + xs[j]
        before_a, before_h = maps_before(group_a, group_h)
        h = before_a * carry[None, :] + before_h
        for j in tl.static_range(G):
            row = group + j
            inside = (first_row + row < T) & in_D[None, :]
            h = decays[j] * h + xs[j]
            tl.store(h_tile + row * h_stride_T, h.to(h_ptr.dtype.element_ty), mask=inside)
        carry = last_group(h, R)
    tl.store(h_last_ptr + sequence * D + channel, carry, mask=in_D)


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
    dh_stride_T,
    dh_stride_D,
    dh_last_stride_B,
    dh_last_stride_D,
    h_stride_B,
    h_stride_T,
    h_stride_D,
    log_a_stride_B,
    log_a_stride_T,
    log_a_stride_D,
    h0_stride_B,
    h0_stride_D,
    reset_stride_B,
    reset_stride_T,
    dx_stride_B,
    dx_stride_T,
    dx_stride_D,
    dlog_a_stride_B,
    dlog_a_stride_T,
    dlog_a_stride_D,
    dh0_stride_B,
    dh0_stride_D,
    HAS_DH_LAST: tl.constexpr,
    HAS_H0: tl.constexpr,
    HAS_RESET: tl.constexpr,
    BD: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The same scan with time reversed, of `f_t = a_t g_t`: row r is token T − 1 − r."""
    stripes = tl.cdiv(D, BD)
    sequence = (tl.program_id(0) // stripes).to(tl.int64)
    channel = (tl.program_id(0) % stripes) * BD + tl.arange(0, BD)
    in_D = channel < D
    column = channel.to(tl.int64)[None, :]
    group = tl.arange(0, R)[:, None] * G
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
    for first_row in tl.range(0, T, R * G, num_stages=STAGES):
        first_token = (T - 1 - first_row).to(tl.int64)
        dh_tile = dh_ptr + first_token * dh_stride_T
        h_tile = h_ptr + (first_token - 1) * h_stride_T
        log_a_tile = log_a_ptr + first_token * log_a_stride_T
        dx_tile = dx_ptr + first_token * dx_stride_T
        dlog_a_tile = dlog_a_ptr + first_token * dlog_a_stride_T
        bits = 0
        if HAS_RESET:
            bits = starts_as_bits(starts, G)
            starts = load_starts(reset_ptr, reset_stride_T, first_row + R * G, T, R, G, True)
        decays = ()
        dhs = ()
        befores = ()
        for j in tl.static_range(G):
            row = group + j
            inside = (row < T - first_row) & in_D[None, :]  # rows past the first token: a = 1, dh = 0, which carries f on
            has_before = (row < T - 1 - first_row) & in_D[None, :]
            log_a = tl.load(log_a_tile - row * log_a_stride_T, mask=inside, other=0)
            dh = tl.load(dh_tile - row * dh_stride_T, mask=inside, other=0)
            befores = befores + (tl.load(h_tile - row * h_stride_T, mask=has_before, other=0),)
            decays = decays + (decay_of(log_a, bits, j, HAS_RESET),)
            dhs = dhs + (dh.to(tl.float32),)
        group_a = decays[0]
        group_f = decays[0] * dhs[0]
        for j in tl.static_range(1, G):
            group_a *= decays[j]
            group_f = decays[j] * (group_f + dhs[j])
        before_a, before_f = maps_before(group_a, group_f)
        f = before_a * carry[None, :] + before_f
        for j in tl.static_range(G):
            row = group + j
            inside = (first_row + row < T) & in_D[None, :]
            has_before = (first_row + row < T - 1) & in_D[None, :]
            g = f + dhs[j]
            f = decays[j] * g
            tl.store(dx_tile - row * dx_stride_T, g.to(dx_ptr.dtype.element_ty), mask=inside)
            dlog_a = (f * befores[j].to(tl.float32)).to(dlog_a_ptr.dtype.element_ty)
            tl.store(dlog_a_tile - row * dlog_a_stride_T, dlog_a, mask=has_before)
        carry = last_group(f, R)
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
        numbers = (time, channels, *x.stride(), *log_a.stride(), *strides(h0, 2), *strides(reset, 2), *h.stride()[:2])
        flags = {"HAS_H0": h0 is not None, "HAS_RESET": reset is not None}
        return Call((batch * blocks(channels, options["BD"]),), numbers, flags | options)

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
        inputs = (*dh.stride(), *strides(dh_last, 2), *h.stride(), *log_a.stride(), *strides(h0, 2), *strides(reset, 2))
        outputs = (*dx.stride(), *dlog_a.stride(), *dh0.stride())
        flags = {"HAS_DH_LAST": dh_last is not None, "HAS_H0": h0 is not None, "HAS_RESET": reset is not None}
        return Call((batch * blocks(channels, options["BD"]),), (time, channels, *inputs, *outputs), flags | options)

    launch(backward_kernel, (dh, dh_last, h, log_a, h0, reset, dx, dlog_a, dh0), prepare)
