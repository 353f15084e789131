"""The Triton kernel of `gelu_backward`: a program takes some rows of 128 columns; every element is read once and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrec.ops import launching
from mmrec.ops.launching import Call, blocks
from mmrec.ops.primitives import LOG2E
from mmrec.ops.sums import add_parts

_COLUMNS, _ROWS, _STEP = 128, 64, 16  # of a program, and the rows that it takes at a time
_STAGES = 3  # of these on their way


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    dhidden_ptr,
    inner_ptr,
    hidden_ptr,
    dinner_ptr,
    parts_ptr,
    rows,
    width,
    BC: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """All (rows, width), contiguous; the sums of a program's rows leave as one row of (programs of a column, width)."""
    stripes = tl.cdiv(width, BC)
    part = tl.program_id(0) // stripes
    column = (tl.program_id(0) % stripes) * BC + tl.arange(0, BC)
    total = tl.zeros((STEP, BC), tl.float32)
    for start in tl.range(0, ROWS, STEP, num_stages=STAGES):
        row = part * ROWS + start + tl.arange(0, STEP)
        offsets = row.to(tl.int64)[:, None] * width + column[None, :]
        inside = (row < rows)[:, None] & (column < width)[None, :]
        x = tl.load(inner_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dhidden_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        below = tl.erf(x * 0.7071067811865476) * 0.5 + 0.5  # Φ(x)
        density = tl.exp2(x * x * (LOG2E * -0.5)) * 0.3989422804014327
        dx = dy * (below + x * density)
        tl.store(hidden_ptr + offsets, (x * below).to(hidden_ptr.dtype.element_ty), mask=inside)
        tl.store(dinner_ptr + offsets, dx.to(dinner_ptr.dtype.element_ty), mask=inside)
        total += dx
    tl.store(parts_ptr + part.to(tl.int64) * width + column, tl.sum(total, 0), mask=column < width)


def launch(dhidden: Tensor, inner: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous (N, G) each; see the public function."""
    rows, width = inner.shape
    hidden, dinner = torch.empty_like(inner), torch.empty_like(inner)
    parts = torch.empty((blocks(rows, _ROWS), width), dtype=torch.float32, device=inner.device)

    def prepare() -> Call:
        named = {"BC": _COLUMNS, "ROWS": _ROWS, "STEP": _STEP, "STAGES": _STAGES, "num_warps": 4}
        return Call((parts.shape[0] * blocks(width, _COLUMNS),), (rows, width), named)

    launching.launch(backward_kernel, (dhidden, inner, hidden, dinner, parts), prepare)
    dbias = torch.empty(width, dtype=dtype, device=inner.device)
    add_parts(parts, dbias)
    return hidden, dinner, dbias
