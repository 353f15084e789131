"""Triton kernels of `short_convolution`: a program takes some tokens of 128 channels; what the taps share comes from the cache."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrec.ops.launching import Call, blocks, launch
from mmrec.ops.sums import add_parts

_CHANNELS, _TOKENS = 128, 16  # of a tile
_LOOP = 8  # tiles of a program, one after another: its sums over tokens leave it once
_STAGES = 2


@triton.jit
def crosses(reset_ptr, token, T):
    """Whether a document starts at each of some tokens; outside of the sequence none does."""
    return tl.load(reset_ptr + token, mask=(token >= 0) & (token < T), other=0) != 0


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    x_ptr,
    weight_ptr,
    reset_ptr,
    y_ptr,
    T,
    C,
    x_stride_b,
    x_stride_t,
    x_stride_c,
    weight_stride_c,
    weight_stride_j,
    J: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """`y_t = Σ_j w_j x_{t−j}`: BT tokens of BC channels, a read of x a tap; `y` is contiguous."""
    stripes = tl.cdiv(C, BC)
    tiles = tl.cdiv(T, BT)
    batch = (tl.program_id(0) // stripes // tiles).to(tl.int64)
    token = (tl.program_id(0) // stripes % tiles) * BT + tl.arange(0, BT)
    channel = ((tl.program_id(0) % stripes) * BC + tl.arange(0, BC)).to(tl.int64)
    inside = channel < C
    x_ptr += batch * x_stride_b
    if reset_ptr is not None:
        reset_ptr += batch * T
    y = tl.zeros((BT, BC), tl.float32)
    visible = token < T
    for back in tl.static_range(J):
        if reset_ptr is not None and back > 0:
            visible &= crosses(reset_ptr, token - (back - 1), T) == 0
        earlier = token - back
        mask = (visible & (earlier >= 0))[:, None] & inside[None, :]
        x = tl.load(x_ptr + earlier.to(tl.int64)[:, None] * x_stride_t + channel[None, :] * x_stride_c, mask=mask, other=0.0)
        gain = tl.load(weight_ptr + channel * weight_stride_c + (J - 1 - back) * weight_stride_j, mask=inside, other=0.0)
        y += x.to(tl.float32) * gain.to(tl.float32)[None, :]
    places = y_ptr + (batch * T + token.to(tl.int64))[:, None] * C + channel[None, :]
    tl.store(places, y.to(y_ptr.dtype.element_ty), mask=(token < T)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    reset_ptr,
    dx_ptr,
    parts_ptr,
    T,
    C,
    dy_stride_b,
    dy_stride_t,
    dy_stride_c,
    x_stride_b,
    x_stride_t,
    x_stride_c,
    weight_stride_c,
    weight_stride_j,
    dx_stride_b,
    dx_stride_t,
    dx_stride_c,
    J: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    LOOP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`dx_t = Σ_j w_j dy_{t+j}`, and of `dw_j = Σ_t x_t dy_{t+j}` a share a program, (programs of a stripe, C, J): one read of dy a tap."""
    stripes = tl.cdiv(C, BC)
    spans = tl.cdiv(T, BT * LOOP)
    part = tl.program_id(0) // stripes
    batch = (part // spans).to(tl.int64)
    channel = ((tl.program_id(0) % stripes) * BC + tl.arange(0, BC)).to(tl.int64)
    inside = channel < C
    dy_ptr += batch * dy_stride_b
    x_ptr += batch * x_stride_b
    dx_ptr += batch * dx_stride_b
    if reset_ptr is not None:
        reset_ptr += batch * T
    sums = ()
    for _ in tl.static_range(J):
        sums = sums + (tl.zeros((BC,), tl.float32),)
    begin = (part % spans) * (BT * LOOP)
    for start in tl.range(begin, begin + BT * LOOP, BT, num_stages=STAGES):
        token = start + tl.arange(0, BT)
        wide_token = token.to(tl.int64)
        mask = (token < T)[:, None] & inside[None, :]
        x = tl.load(x_ptr + wide_token[:, None] * x_stride_t + channel[None, :] * x_stride_c, mask=mask, other=0.0).to(tl.float32)
        dx = tl.zeros((BT, BC), tl.float32)
        visible = token < T
        after = ()
        for ahead in tl.static_range(J):
            later = token + ahead
            if reset_ptr is not None and ahead > 0:
                visible &= crosses(reset_ptr, later, T) == 0
            reached = (visible & (later < T))[:, None] & inside[None, :]
            place = dy_ptr + later.to(tl.int64)[:, None] * dy_stride_t + channel[None, :] * dy_stride_c
            dy = tl.load(place, mask=reached, other=0.0).to(tl.float32)
            gain = tl.load(weight_ptr + channel * weight_stride_c + (J - 1 - ahead) * weight_stride_j, mask=inside, other=0.0)
            dx += dy * gain.to(tl.float32)[None, :]
            after = after + (sums[ahead] + tl.sum(x * dy, 0),)
        sums = after
        tl.store(dx_ptr + wide_token[:, None] * dx_stride_t + channel[None, :] * dx_stride_c, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    for ahead in tl.static_range(J):
        tl.store(parts_ptr + (part.to(tl.int64) * C + channel) * J + (J - 1 - ahead), sums[ahead], mask=inside)


def launch_forward(x: Tensor, weight: Tensor, reset: Tensor | None) -> Tensor:
    """(B, T, C), contiguous in the dtype of `x`."""
    batch, time, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)

    def prepare() -> Call:
        grid = (blocks(channels, _CHANNELS) * blocks(time, _TOKENS) * batch,)
        numbers = (time, channels, *x.stride(), *weight.stride())
        return Call(grid, numbers, {"J": weight.shape[1], "BT": _TOKENS, "BC": _CHANNELS, "num_warps": 4})

    launch(forward_kernel, (x, weight, None if reset is None else reset.contiguous(), y), prepare)
    return y


def launch_backward(dy: Tensor, x: Tensor, weight: Tensor, reset: Tensor | None, dx: Tensor, dweight: Tensor) -> None:
    """Gradients into the given tensors, of any strides and dtypes."""
    batch, time, channels = x.shape
    spans = batch * blocks(time, _TOKENS * _LOOP)
    parts = torch.empty((spans, channels, weight.shape[1]), dtype=torch.float32, device=x.device)

    def prepare() -> Call:
        numbers = (time, channels, *dy.stride(), *x.stride(), *weight.stride(), *dx.stride())
        named = {"J": weight.shape[1], "BT": _TOKENS, "BC": _CHANNELS, "LOOP": _LOOP, "STAGES": _STAGES, "num_warps": 4}
        return Call((blocks(channels, _CHANNELS) * spans,), numbers, named)

    launch(backward_kernel, (dy, x, weight, None if reset is None else reset.contiguous(), dx, parts), prepare)
    add_parts(parts, dweight)
