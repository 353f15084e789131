"""Triton kernels of `decay_log`: a program takes some tokens of 128 channels; every element is read once and written once."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrec.ops.launching import Call, blocks, launch, strides
from mmrec.ops.primitives import LOG2E
from mmrec.ops.sums import add_parts
from mmrec.ops.tiles import load_tile, store_tile, tile_of, tiles_and_warps, tokens_and_warps

_COLUMNS = 128  # channels of a program


@triton.jit
def logsigmoid(x):
    """`log σ(x)`, to 1e-6 relative for any x: `min(x, 0) − log1p(e^−|x|)`, the latter as `2 artanh(y / (2 + y))`, y ≤ 1.

    A logarithm of 1 + y keeps few digits of a small y, and long time constants are small y.
    """
    y = tl.exp2(-tl.abs(x) * LOG2E)
    s = y / (2.0 + y)
    square = s * s
    series = 1.0 / 15
    series = series * square + 1.0 / 13
    series = series * square + 1.0 / 11
    series = series * square + 1.0 / 9
    series = series * square + 1.0 / 7
    series = series * square + 1.0 / 5
    series = series * square + 1.0 / 3
    series = series * square + 1.0
    return tl.minimum(x, 0.0) - 2.0 * s * series


@triton.jit
def load_logits(ptr, bias_ptr, batch, stripe, first, stride_b, stride_t, stride_d, T, D, M: tl.constexpr, BK: tl.constexpr):
    """Logits and their bias, (M, BK) fp32, zeros outside."""
    width = D - stripe * BK
    columns = stripe * BK + tl.arange(0, BK)
    bias = tl.load(bias_ptr + columns, mask=columns < D, other=0.0)
    return load_tile(ptr, batch, stripe, first, stride_b, stride_t, stride_d * BK, stride_d, T, width, M, BK) + bias[None, :]


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    logits_ptr,
    bias_ptr,
    context_ptr,
    context_bias_ptr,
    log_gamma_ptr,
    T,
    D,
    logits_stride_b,
    logits_stride_t,
    logits_stride_d,
    context_stride_b,
    context_stride_t,
    context_stride_d,
    log_gamma_stride_b,
    log_gamma_stride_t,
    low,
    high,
    HAS_CONTEXT: tl.constexpr,
    M: tl.constexpr,
    BK: tl.constexpr,
):
    batch, stripe, first = tile_of(T, tl.cdiv(D, BK), M)
    logits = load_logits(logits_ptr, bias_ptr, batch, stripe, first, logits_stride_b, logits_stride_t, logits_stride_d, T, D, M, BK)
    log_gamma = logsigmoid(logits)
    if HAS_CONTEXT:
        context = load_logits(
            context_ptr, context_bias_ptr, batch, stripe, first, context_stride_b, context_stride_t, context_stride_d, T, D, M, BK
        )
        log_gamma += logsigmoid(context)
    log_gamma = tl.minimum(tl.maximum(log_gamma, low), high)
    width = D - stripe * BK
    store_tile(log_gamma_ptr, log_gamma, batch, stripe, first, log_gamma_stride_b, log_gamma_stride_t, BK, 1, T, width, M, BK)


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    dlog_gamma_ptr,
    logits_ptr,
    bias_ptr,
    context_ptr,
    context_bias_ptr,
    dlogits_ptr,
    dcontext_ptr,
    parts_ptr,
    T,
    D,
    dlog_gamma_stride_b,
    dlog_gamma_stride_t,
    dlog_gamma_stride_d,
    logits_stride_b,
    logits_stride_t,
    logits_stride_d,
    context_stride_b,
    context_stride_t,
    context_stride_d,
    dlogits_stride_b,
    dlogits_stride_t,
    dlogits_stride_d,
    dcontext_stride_b,
    dcontext_stride_t,
    dcontext_stride_d,
    parts_stride_bias,
    parts_stride_tile,
    least,
    least_lost,
    HAS_CONTEXT: tl.constexpr,
    LOOP: tl.constexpr,
    STAGES: tl.constexpr,
    M: tl.constexpr,
    BK: tl.constexpr,
):
    """The biases' gradients leave as one row a program, (2, programs of a channel, D), to be summed in a fixed order."""
    stripes = tl.cdiv(D, BK)
    batch, stripe, begin = tile_of(T, stripes, M * LOOP)
    width = D - stripe * BK
    dbias = tl.zeros((M, BK), tl.float32)
    dcontext_bias = tl.zeros((M, BK), tl.float32)
    for tile in tl.range(0, LOOP, num_stages=STAGES):
        first = begin + tile * M
        logits = load_logits(logits_ptr, bias_ptr, batch, stripe, first, logits_stride_b, logits_stride_t, logits_stride_d, T, D, M, BK)
        dlog_gamma = load_tile(
            dlog_gamma_ptr, batch, stripe, first, dlog_gamma_stride_b, dlog_gamma_stride_t, dlog_gamma_stride_d * BK, dlog_gamma_stride_d,
            T, width, M, BK,
        )  # fmt: skip
        lost = 1.0 / (1.0 + tl.exp2(logits * LOG2E))  # 1 − σ
        gamma = 1.0 / (1.0 + tl.exp2(-logits * LOG2E))
        lost_of_both = lost
        if HAS_CONTEXT:
            context = load_logits(
                context_ptr, context_bias_ptr, batch, stripe, first, context_stride_b, context_stride_t, context_stride_d, T, D, M, BK
            )
            context_lost = 1.0 / (1.0 + tl.exp2(context * LOG2E))
            lost_of_both += gamma * context_lost
            gamma *= 1.0 / (1.0 + tl.exp2(-context * LOG2E))
        # Each bound where it can be told apart: γ from nothing, 1 − γ from nothing.
        inside = tl.where((gamma >= least) & (lost_of_both >= least_lost), dlog_gamma, 0.0)
        dlogits = inside * lost
        store_tile(
            dlogits_ptr, dlogits, batch, stripe, first, dlogits_stride_b, dlogits_stride_t, dlogits_stride_d * BK, dlogits_stride_d,
            T, width, M, BK,
        )  # fmt: skip
        dbias += dlogits
        if HAS_CONTEXT:
            dcontext = inside * context_lost
            store_tile(
                dcontext_ptr, dcontext, batch, stripe, first,
                dcontext_stride_b, dcontext_stride_t, dcontext_stride_d * BK, dcontext_stride_d, T, width, M, BK,
            )  # fmt: skip
            dcontext_bias += dcontext
    columns = tl.arange(0, BK)
    parts = parts_ptr + (tl.program_id(0) // stripes).to(tl.int64) * parts_stride_tile + stripe * BK + columns
    tl.store(parts, tl.sum(dbias, 0), mask=columns < width)
    if HAS_CONTEXT:
        tl.store(parts + parts_stride_bias, tl.sum(dcontext_bias, 0), mask=columns < width)


def launch_forward(logits: Tensor, bias: Tensor, context: Tensor | None, context_bias: Tensor | None, low: float, high: float) -> Tensor:
    """Log-decays (B, T, D), contiguous fp32; logits with any strides, biases contiguous."""
    batch, time, channels = logits.shape
    log_gamma = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)

    def prepare() -> Call:
        options = tokens_and_warps(time, _COLUMNS)
        numbers = (time, channels, *logits.stride(), *strides(context, 3), *log_gamma.stride()[:2], low, high)
        grid = (batch * blocks(time, options["M"]) * blocks(channels, _COLUMNS),)
        return Call(grid, numbers, {"HAS_CONTEXT": context is not None} | options)

    launch(forward_kernel, (logits, bias, context, context_bias, log_gamma), prepare, low, high)
    return log_gamma


def launch_backward(
    dlog_gamma: Tensor,
    logits: Tensor,
    bias: Tensor,
    context: Tensor | None,
    context_bias: Tensor | None,
    low: float,
    high: float,
    dlogits: Tensor,
    dbias: Tensor,
    dcontext: Tensor | None,
    dcontext_bias: Tensor | None,
) -> None:
    """Write the gradients into the given tensors, of any strides and dtypes."""
    batch, time, channels = logits.shape
    options = tiles_and_warps(time, _COLUMNS)
    tiles = batch * blocks(time, options["M"] * options["LOOP"])
    parts = torch.empty((1 if context is None else 2, tiles, channels), dtype=torch.float32, device=logits.device)

    def prepare() -> Call:
        inputs = (*dlog_gamma.stride(), *logits.stride(), *strides(context, 3))
        outputs = (*dlogits.stride(), *strides(dcontext, 3), *parts.stride()[:2])
        flags = {"HAS_CONTEXT": context is not None}
        bounds = (math.exp(low), -math.expm1(high))
        return Call((tiles * blocks(channels, _COLUMNS),), (time, channels, *inputs, *outputs, *bounds), flags | options)

    launch(backward_kernel, (dlog_gamma, logits, bias, context, context_bias, dlogits, dcontext, parts), prepare, low, high)
    add_parts(parts if dcontext_bias is not None else parts[0], dbias, dcontext_bias)
