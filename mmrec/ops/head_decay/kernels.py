"""Triton kernels of `head_decay`: the forward takes some tokens through all of D, the backward forms what two small products need."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrec.ops.decay_log.kernels import logsigmoid
from mmrec.ops.launching import Call, blocks, launch, power_of_two
from mmrec.ops.primitives import LOG2E
from mmrec.ops.registration import INTERPRETED
from mmrec.ops.sums import add_parts

_TOKENS = 64  # of a program: 128 programs for 8,192 tokens
_CHANNELS = 128  # read at a time
_STAGES = 4  # of these on their way


@triton.jit(do_not_specialize=["T", "rows"])
def forward_kernel(
    x_ptr,
    w_ptr,
    A_log_ptr,
    dt_bias_ptr,
    log_alpha_ptr,
    logits_ptr,
    T,
    rows,
    x_stride_b,
    x_stride_t,
    x_stride_d,
    w_stride_h,
    w_stride_d,
    H: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """SPLIT: `x` is narrow, and the fp32 weight enters as the sum of two numbers of its dtype, which keeps 16 bits of it."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    head = tl.arange(0, BH)
    x_rows = x_ptr + (row // T).to(tl.int64)[:, None] * x_stride_b + (row % T).to(tl.int64)[:, None] * x_stride_t
    w_rows = w_ptr + head[:, None] * w_stride_h
    logits = tl.zeros((M, BH), tl.float32)
    for first in tl.range(0, D, BK, num_stages=STAGES):
        channel = (first + tl.arange(0, BK)).to(tl.int64)[None, :]
        x = tl.load(x_rows + channel * x_stride_d, mask=(row < rows)[:, None] & (channel < D), other=0.0)
        w = tl.load(w_rows + channel * w_stride_d, mask=(head < H)[:, None] & (channel < D), other=0.0)
        if SPLIT:
            high = w.to(x_ptr.dtype.element_ty)
            low = (w - high.to(tl.float32)).to(x_ptr.dtype.element_ty)
            logits = tl.dot(x, tl.trans(high), logits)
            logits = tl.dot(x, tl.trans(low), logits)
        else:
            logits = tl.dot(x.to(tl.float32), tl.trans(w), logits, input_precision="ieee")
    rate = tl.exp2(tl.load(A_log_ptr + head, mask=head < H, other=0.0) * LOG2E)
    dt_bias = tl.load(dt_bias_ptr + head, mask=head < H, other=0.0)
    log_alpha = rate[None, :] * logsigmoid(-(logits + dt_bias[None, :]))
    inside = (row < rows)[:, None] & (head < H)[None, :]
    target = row.to(tl.int64)[:, None] * H + head[None, :]
    tl.store(log_alpha_ptr + target, log_alpha, mask=inside)
    tl.store(logits_ptr + target, logits, mask=inside)


@triton.jit(do_not_specialize=["T", "rows"])
def backward_kernel(
    dlog_alpha_ptr,
    logits_ptr,
    A_log_ptr,
    dt_bias_ptr,
    dlogits_ptr,
    parts_ptr,
    T,
    rows,
    dlog_alpha_stride_b,
    dlog_alpha_stride_t,
    dlog_alpha_stride_h,
    parts_stride,
    H: tl.constexpr,
    M: tl.constexpr,
    BH: tl.constexpr,
):
    """The sums over tokens leave as one row a program, (2, programs, H), to be summed in a fixed order."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    head = tl.arange(0, BH)
    inside = (row < rows)[:, None] & (head < H)[None, :]
    source = (row // T).to(tl.int64)[:, None] * dlog_alpha_stride_b + (row % T).to(tl.int64)[:, None] * dlog_alpha_stride_t
    dlog_alpha = tl.load(dlog_alpha_ptr + source + head[None, :] * dlog_alpha_stride_h, mask=inside, other=0.0).to(tl.float32)
    target = row.to(tl.int64)[:, None] * H + head[None, :]
    logits = tl.load(logits_ptr + target, mask=inside, other=0.0)
    biased = logits + tl.load(dt_bias_ptr + head, mask=head < H, other=0.0)[None, :]
    d_rate = dlog_alpha * tl.exp2(tl.load(A_log_ptr + head, mask=head < H, other=0.0) * LOG2E)[None, :]
    dlogits = -d_rate / (1.0 + tl.exp2(-biased * LOG2E))
    tl.store(dlogits_ptr + target, dlogits.to(dlogits_ptr.dtype.element_ty), mask=inside)
    parts = parts_ptr + tl.program_id(0).to(tl.int64) * H + head
    tl.store(parts, tl.sum(d_rate * logsigmoid(-biased), 0), mask=head < H)
    tl.store(parts + parts_stride, tl.sum(dlogits, 0), mask=head < H)


def _heads(heads: int) -> int:
    """Columns of a tile: a matrix product has 16 at least."""
    return max(16, power_of_two(heads))


def launch_forward(x: Tensor, w_alpha: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """`log α` and its logits before their bias, (B, T, H) fp32, contiguous."""
    batch, time, width = x.shape
    heads = w_alpha.shape[0]
    log_alpha, logits = (torch.empty((batch, time, heads), dtype=torch.float32, device=x.device) for _ in range(2))

    def prepare() -> Call:
        numbers = (time, batch * time, *x.stride(), *w_alpha.stride())
        split = x.dtype != torch.float32 and w_alpha.dtype == torch.float32 and not INTERPRETED  # it computes bf16 as integers
        columns = _heads(heads)
        # Many heads: fewer channels at a time, so that the stages fit the shared memory.
        tile = {"M": _TOKENS, "BH": columns, "BK": max(16, min(_CHANNELS, 8192 // columns)), "SPLIT": split, "STAGES": _STAGES}
        return Call((blocks(batch * time, _TOKENS),), numbers, {"H": heads, "D": width} | tile | {"num_warps": 4})

    launch(forward_kernel, (x, w_alpha, A_log.contiguous(), dt_bias.contiguous(), log_alpha, logits), prepare)
    return log_alpha, logits


def launch_backward(
    dlog_alpha: Tensor,
    logits: Tensor,
    x: Tensor,
    w_alpha: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    dx: Tensor,
    dw_alpha: Tensor,
    dA_log: Tensor,
    ddt_bias: Tensor,
) -> None:
    """Write the gradients into the given tensors, of any strides and dtypes."""
    batch, time, heads = logits.shape
    programs = blocks(batch * time, _TOKENS)
    parts = torch.empty((2, programs, heads), dtype=torch.float32, device=x.device)
    # As narrow as the input, like every gradient that enters a matrix product.
    dlogits = torch.empty((batch * time, heads), dtype=x.dtype, device=x.device)

    def prepare() -> Call:
        numbers = (time, batch * time, *dlog_alpha.stride(), parts.stride(0))
        return Call((programs,), numbers, {"H": heads, "M": _TOKENS, "BH": _heads(heads), "num_warps": 4})

    launch(backward_kernel, (dlog_alpha, logits.contiguous(), A_log.contiguous(), dt_bias.contiguous(), dlogits, parts), prepare)
    flat = x.flatten(0, 1)
    with torch.autocast(x.device.type, enabled=False):
        narrow = w_alpha.to(x.dtype)
        if dx.is_contiguous() and dx.dtype == x.dtype:
            torch.mm(dlogits, narrow, out=dx.view(flat.shape))
        else:
            dx.copy_((dlogits @ narrow).view(dx.shape))
        wide = x.is_cuda and x.dtype != torch.float32
        dw_alpha.copy_(torch.mm(dlogits.T, flat, out_dtype=torch.float32) if wide else dlogits.T @ flat)
    add_parts(parts, dA_log, ddt_bias)
