"""Triton kernels of `rms_norm`: a row lies in the registers of one program, read once and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrec.ops.launching import Call, blocks, launch, power_of_two, strides
from mmrec.ops.sums import add_parts

_ROWS = 16  # tokens of a program of the backward, whose sums over tokens leave it as one row
_STAGES = 2  # of these tokens on their way
_MAX_WIDTH = 65536
_A_WARP = 512  # channels


@triton.jit
def _row(ptr, row, T, stride_b, stride_t):
    """Where token `row` of B·T begins, in 64 bits."""
    return ptr + (row // T).to(tl.int64) * stride_b + (row % T).to(tl.int64) * stride_t


@triton.jit
def _load(ptr, row, T, stride_b, stride_t, stride_d, columns, inside):
    return tl.load(_row(ptr, row, T, stride_b, stride_t) + columns * stride_d, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    copy_ptr,
    T,
    x_stride_b,
    x_stride_t,
    x_stride_d,
    weight_stride,
    y_stride_b,
    y_stride_t,
    eps,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    """`copy`, if it is wanted, gets the row as it was read, laid out as `y` is."""
    row = tl.program_id(0)
    columns = tl.arange(0, BD).to(tl.int64)
    inside = columns < D
    x = _load(x_ptr, row, T, x_stride_b, x_stride_t, x_stride_d, columns, inside)
    weight = tl.load(weight_ptr + columns * weight_stride, mask=inside, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps) * weight
    tl.store(_row(y_ptr, row, T, y_stride_b, y_stride_t) + columns, y.to(y_ptr.dtype.element_ty), mask=inside)
    if copy_ptr is not None:
        tl.store(_row(copy_ptr, row, T, y_stride_b, y_stride_t) + columns, x.to(copy_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "rows"])
def backward_kernel(
    dy_ptr,
    dy_more_ptr,
    dx_more_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,
    parts_ptr,
    T,
    rows,
    dy_stride_b,
    dy_stride_t,
    dy_stride_d,
    dy_more_stride_b,
    dy_more_stride_t,
    dy_more_stride_d,
    dx_more_stride_b,
    dx_more_stride_t,
    dx_more_stride_d,
    x_stride_b,
    x_stride_t,
    x_stride_d,
    weight_stride,
    dx_stride_b,
    dx_stride_t,
    dx_stride_d,
    eps,
    D: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """R tokens one after another; the weight's gradient leaves as one row a program, to be summed in a fixed order."""
    columns = tl.arange(0, BD).to(tl.int64)
    inside = columns < D
    weight = tl.load(weight_ptr + columns * weight_stride, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((BD,), tl.float32)
    first = tl.program_id(0) * R
    for row in tl.range(first, tl.minimum(first + R, rows), num_stages=STAGES):
        dy = _load(dy_ptr, row, T, dy_stride_b, dy_stride_t, dy_stride_d, columns, inside)
        if dy_more_ptr is not None:
            dy += _load(dy_more_ptr, row, T, dy_more_stride_b, dy_more_stride_t, dy_more_stride_d, columns, inside)
        x = _load(x_ptr, row, T, x_stride_b, x_stride_t, x_stride_d, columns, inside)
        scale = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
        unit = x * scale
        d_unit = dy * weight
        dx = scale * (d_unit - unit * (tl.sum(unit * d_unit, 0) / D))
        if dx_more_ptr is not None:
            dx += _load(dx_more_ptr, row, T, dx_more_stride_b, dx_more_stride_t, dx_more_stride_d, columns, inside)
        target = _row(dx_ptr, row, T, dx_stride_b, dx_stride_t) + columns * dx_stride_d
        tl.store(target, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dweight += dy * unit
    tl.store(parts_ptr + tl.program_id(0).to(tl.int64) * D + columns, dweight, mask=inside)


def _tile(width: int) -> dict[str, int]:
    """A row's padded width and its warps: 16 elements a thread where there are so many."""
    columns = power_of_two(width)
    if columns > _MAX_WIDTH:
        raise ValueError(f"rms_norm: {width} channels do not fit a program's registers; {_MAX_WIDTH} do")
    return {"BD": columns, "num_warps": min(16, max(1, columns // _A_WARP))}


def launch_forward(x: Tensor, weight: Tensor, eps: float, copied: bool = False) -> tuple[Tensor, Tensor | None]:
    """The normed rows and, if wanted, a copy of `x`, each (B, T, D), contiguous in the dtype of `x`."""
    batch, time, width = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    copy = torch.empty_like(y) if copied else None

    def prepare() -> Call:
        numbers = (time, *x.stride(), *weight.stride(), *y.stride()[:2], eps)
        return Call((batch * time,), numbers, {"D": width} | _tile(width))

    launch(forward_kernel, (x, weight, y, copy), prepare, eps)
    return y, copy


def launch_backward(
    dy: Tensor, dy_more: Tensor | None, dx_more: Tensor | None, x: Tensor, weight: Tensor, eps: float, dx: Tensor, dweight: Tensor
) -> None:
    """Write the gradients into the given tensors, of any strides and dtypes."""
    batch, time, width = x.shape
    programs = blocks(batch * time, _ROWS)
    parts = torch.empty((programs, width), dtype=torch.float32, device=x.device)

    def prepare() -> Call:
        inputs = (stride for tensor in (dy, dy_more, dx_more, x) for stride in strides(tensor, 3))
        numbers = (time, batch * time, *inputs, *weight.stride(), *dx.stride(), eps)
        return Call((programs,), numbers, {"D": width, "R": _ROWS, "STAGES": _STAGES} | _tile(width))

    launch(backward_kernel, (dy, dy_more, dx_more, x, weight, dx, parts), prepare, eps)
    add_parts(parts, dweight)
