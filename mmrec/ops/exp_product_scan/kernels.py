"""Triton kernels of `exp_product_scan`: sums of logs in tiles, float32 or float64, one exponential an element (see the README)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrec.ops.launching import Call, blocks, check_row_strides, launch, strides
from mmrec.ops.primitives import LOG2E, last_group, sums_before
from mmrec.ops.tuning import channel_class, launch_options

ROUNDER = tl.constexpr(6755399441055744.0)  # 1.5 · 2^52: added to a float64, it leaves the nearest integer in the low bits


@triton.jit
def scaled_exp(y0, log_product):
    """`y0 · exp(log_product)` in fp32.

    A float64 sum s is split into n + f with s·log2 e = n + f, |f| ≤ 1/2: 2^f in fp32 keeps all the digits that fp32 has. 2^n goes in
    two halves, each a normal number. Below 2^−250 no y0 reaches 1e-30: zero, which also takes the sums that n cannot hold.
    """
    if log_product.dtype == tl.float64:
        exponent = log_product * LOG2E
        rounded = exponent + ROUNDER
        n = tl.minimum(rounded.to(tl.int64, bitcast=True).to(tl.int32), 254)
        y = y0 * tl.exp2((exponent - (rounded - ROUNDER)).to(tl.float32))
        first = n >> 1
        y = y * ((first + 127) << 23).to(tl.float32, bitcast=True) * ((n - first + 127) << 23).to(tl.float32, bitcast=True)
        y = tl.where(exponent <= -250.0, 0.0, y)
    else:
        y = y0 * tl.exp2(log_product * LOG2E)
    return y


@triton.jit
def load_sums(tile, stride_T, left, in_D, ACCUMULATE: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, G: tl.constexpr):
    """Running sums over the G rows of each group, a tuple of [R, BD]; rows past the end add nothing."""
    sums = ()
    total = tl.zeros([R, BD], ACCUMULATE)
    for j in tl.static_range(G):
        row = tl.arange(0, R)[:, None] * G + j
        total += tl.load(tile + row * stride_T, mask=(row < left) & in_D[None, :], other=0).to(tl.float32).to(ACCUMULATE)
        sums = sums + (total,)
    return sums


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    log_gamma_ptr,
    y0_ptr,
    y_ptr,
    y_last_ptr,
    T,
    D,
    log_gamma_stride_B,
    log_gamma_stride_T,
    log_gamma_stride_D,
    y0_stride_B,
    y0_stride_D,
    y_stride_B,
    y_stride_T,
    ACCUMULATE: tl.constexpr,
    HAS_Y0: tl.constexpr,
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
    log_gamma_ptr += sequence * log_gamma_stride_B + column * log_gamma_stride_D
    y_ptr += sequence * y_stride_B + column
    y0 = tl.full([BD], 1.0, tl.float32)
    if HAS_Y0:
        y0 = tl.load(y0_ptr + sequence * y0_stride_B + channel * y0_stride_D, mask=in_D, other=0).to(tl.float32)
    carry = tl.zeros([BD], ACCUMULATE)
    for first_row in tl.range(0, T, R * G, num_stages=STAGES):
        first_token = tl.cast(first_row, tl.int64)
        log_gamma_tile = log_gamma_ptr + first_token * log_gamma_stride_T
        y_tile = y_ptr + first_token * y_stride_T
        sums = load_sums(log_gamma_tile, log_gamma_stride_T, T - first_row, in_D, ACCUMULATE, BD, R, G)
        before = sums_before(sums[G - 1]) + carry[None, :]
        for j in tl.static_range(G):
            row = group + j
            y = scaled_exp(y0[None, :], before + sums[j])
            # Another expression than the loads' mask, or the pipeline carries that one along with every tile in flight.
            tl.store(y_tile + row * y_stride_T, y.to(y_ptr.dtype.element_ty), mask=(first_row + row < T) & in_D[None, :])
        carry = last_group(before + sums[G - 1], R)
    tl.store(y_last_ptr + sequence * D + channel, scaled_exp(y0, carry), mask=in_D)


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    dy_ptr,
    dy_last_ptr,
    y_ptr,
    y_last_ptr,
    dlog_gamma_ptr,
    T,
    D,
    dy_stride_B,
    dy_stride_T,
    dy_stride_D,
    dy_last_stride_B,
    dy_last_stride_D,
    y_stride_B,
    y_stride_T,
    y_stride_D,
    y_last_stride_B,
    y_last_stride_D,
    dlog_gamma_stride_B,
    dlog_gamma_stride_T,
    dlog_gamma_stride_D,
    ACCUMULATE: tl.constexpr,
    HAS_DY_LAST: tl.constexpr,
    BD: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The running sum of `dY_t Y_t` from the end: row r is token T − 1 − r."""
    stripes = tl.cdiv(D, BD)
    sequence = (tl.program_id(0) // stripes).to(tl.int64)
    channel = (tl.program_id(0) % stripes) * BD + tl.arange(0, BD)
    in_D = channel < D
    column = channel.to(tl.int64)[None, :]
    group = tl.arange(0, R)[:, None] * G
    dy_ptr += sequence * dy_stride_B + column * dy_stride_D
    y_ptr += sequence * y_stride_B + column * y_stride_D
    dlog_gamma_ptr += sequence * dlog_gamma_stride_B + column * dlog_gamma_stride_D
    carry = tl.zeros([BD], ACCUMULATE)
    if HAS_DY_LAST:
        dy_last = tl.load(dy_last_ptr + sequence * dy_last_stride_B + channel * dy_last_stride_D, mask=in_D, other=0).to(tl.float32)
        y_last = tl.load(y_last_ptr + sequence * y_last_stride_B + channel * y_last_stride_D, mask=in_D, other=0)
        carry = (dy_last * y_last).to(ACCUMULATE)
    for first_row in tl.range(0, T, R * G, num_stages=STAGES):
        first_token = (T - 1 - first_row).to(tl.int64)
        dy_tile = dy_ptr + first_token * dy_stride_T
        y_tile = y_ptr + first_token * y_stride_T
        dlog_gamma_tile = dlog_gamma_ptr + first_token * dlog_gamma_stride_T
        sums = ()
        total = tl.zeros([R, BD], ACCUMULATE)
        for j in tl.static_range(G):
            row = group + j
            inside = (row < T - first_row) & in_D[None, :]
            dy = tl.load(dy_tile - row * dy_stride_T, mask=inside, other=0).to(tl.float32)
            y = tl.load(y_tile - row * y_stride_T, mask=inside, other=0).to(tl.float32)
            total += (dy * y).to(ACCUMULATE)
            sums = sums + (total,)
        before = sums_before(sums[G - 1]) + carry[None, :]
        for j in tl.static_range(G):
            row = group + j
            dlog_gamma = (before + sums[j]).to(tl.float32).to(dlog_gamma_ptr.dtype.element_ty)
            tl.store(dlog_gamma_tile - row * dlog_gamma_stride_T, dlog_gamma, mask=(first_row + row < T) & in_D[None, :])
        carry = last_group(before + sums[G - 1], R)


@triton.jit(do_not_specialize=["T"])
def start_gradient_kernel(
    dy_ptr,
    dy_last_ptr,
    log_gamma_ptr,
    dy0_ptr,
    T,
    D,
    dy_stride_B,
    dy_stride_T,
    dy_stride_D,
    dy_last_stride_B,
    dy_last_stride_D,
    log_gamma_stride_B,
    log_gamma_stride_T,
    log_gamma_stride_D,
    dy0_stride_B,
    dy0_stride_D,
    ACCUMULATE: tl.constexpr,
    HAS_DY_LAST: tl.constexpr,
    BD: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`dy0`: the products again, forward in time. `Y / y0` would be 0/0 where y0 is zero."""
    stripes = tl.cdiv(D, BD)
    sequence = (tl.program_id(0) // stripes).to(tl.int64)
    channel = (tl.program_id(0) % stripes) * BD + tl.arange(0, BD)
    in_D = channel < D
    column = channel.to(tl.int64)[None, :]
    group = tl.arange(0, R)[:, None] * G
    log_gamma_ptr += sequence * log_gamma_stride_B + column * log_gamma_stride_D
    dy_ptr += sequence * dy_stride_B + column * dy_stride_D
    carry = tl.zeros([BD], ACCUMULATE)
    gradient = tl.zeros([R, BD], ACCUMULATE)
    for first_row in tl.range(0, T, R * G, num_stages=STAGES):
        first_token = tl.cast(first_row, tl.int64)
        dy_tile = dy_ptr + first_token * dy_stride_T
        log_gamma_tile = log_gamma_ptr + first_token * log_gamma_stride_T
        sums = load_sums(log_gamma_tile, log_gamma_stride_T, T - first_row, in_D, ACCUMULATE, BD, R, G)
        dys = ()
        for j in tl.static_range(G):
            row = group + j
            dys = dys + (tl.load(dy_tile + row * dy_stride_T, mask=(row < T - first_row) & in_D[None, :], other=0),)
        before = sums_before(sums[G - 1]) + carry[None, :]
        of_group = tl.zeros([R, BD], tl.float32)
        for j in tl.static_range(G):
            of_group += scaled_exp(dys[j].to(tl.float32), before + sums[j])
        gradient += of_group.to(ACCUMULATE)
        carry = last_group(before + sums[G - 1], R)
    dy0 = tl.sum(gradient, axis=0).to(tl.float32)
    if HAS_DY_LAST:
        dy_last = tl.load(dy_last_ptr + sequence * dy_last_stride_B + channel * dy_last_stride_D, mask=in_D, other=0).to(tl.float32)
        dy0 += scaled_exp(dy_last, carry)
    tl.store(dy0_ptr + sequence * dy0_stride_B + channel * dy0_stride_D, dy0.to(dy0_ptr.dtype.element_ty), mask=in_D)


def shape_class(batch: int, channels: int, accum_dtype: torch.dtype) -> str:
    """`many …` where stripes of 64 channels fill the multiprocessors of a large GPU, else `few …`; `… float64` needs more registers."""
    return f"{channel_class(batch, channels)} {'float64' if accum_dtype == torch.float64 else 'float32'}"


def launch_forward(log_gamma: Tensor, y0: Tensor | None, accum_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`Y` (B, T, D) in the dtype of `log_gamma` and `y_last` (B, D) fp32; inputs with any strides."""
    batch, time, channels = log_gamma.shape
    y = torch.empty(log_gamma.shape, dtype=log_gamma.dtype, device=log_gamma.device)
    y_last = torch.empty((batch, channels), dtype=torch.float32, device=log_gamma.device)

    def prepare() -> Call:
        options = launch_options("exp_product_scan.forward", shape_class(batch, channels, accum_dtype), log_gamma.device)
        check_row_strides("exp_product_scan", options["R"] * options["G"], log_gamma)
        numbers = (time, channels, *log_gamma.stride(), *strides(y0, 2), *y.stride()[:2])
        flags = {"ACCUMULATE": _in_triton(accum_dtype), "HAS_Y0": y0 is not None}
        return Call((batch * blocks(channels, options["BD"]),), numbers, flags | options)

    launch(forward_kernel, (log_gamma, y0, y, y_last), prepare, accum_dtype)
    return y, y_last


def launch_backward(
    dy: Tensor,
    dy_last: Tensor | None,
    y: Tensor,
    y_last: Tensor,
    log_gamma: Tensor | None,
    accum_dtype: torch.dtype,
    dlog_gamma: Tensor,
    dy0: Tensor | None,
) -> None:
    """Write `dlog_gamma` (B, T, D), and `dy0` (B, D) where `log_gamma` is given: views of any dtype and strides."""
    batch, time, channels = dy.shape
    flags = {"ACCUMULATE": _in_triton(accum_dtype), "HAS_DY_LAST": dy_last is not None}

    def prepare() -> Call:
        options = launch_options("exp_product_scan.backward", shape_class(batch, channels, accum_dtype), dy.device)
        check_row_strides("exp_product_scan", options["R"] * options["G"], dy, y, dlog_gamma)
        numbers = (time, channels, *dy.stride(), *strides(dy_last, 2), *y.stride(), *y_last.stride(), *dlog_gamma.stride())
        return Call((batch * blocks(channels, options["BD"]),), numbers, flags | options)

    launch(backward_kernel, (dy, dy_last, y, y_last, dlog_gamma), prepare, accum_dtype)
    if log_gamma is None or dy0 is None:
        return

    def prepare_start() -> Call:
        options = launch_options("exp_product_scan.start_gradient", shape_class(batch, channels, accum_dtype), dy.device)
        check_row_strides("exp_product_scan", options["R"] * options["G"], dy, log_gamma)
        numbers = (time, channels, *dy.stride(), *strides(dy_last, 2), *log_gamma.stride(), *dy0.stride())
        return Call((batch * blocks(channels, options["BD"]),), numbers, flags | options)

    launch(start_gradient_kernel, (dy, dy_last, log_gamma, dy0), prepare_start, accum_dtype)


def _in_triton(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32
