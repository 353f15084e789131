"""Log-decays of `window_attention` as its kernels read them: what is float64 in them is subtracted once a tile, not once a token."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrec.ops.launching import Call, blocks, launch
from mmrec.ops.primitives import LOG2E

_TOKENS = 2048  # of a step of a program, which walks along its sequence


@triton.jit(do_not_specialize=["S", "stride_b"])
def decays_kernel(
    log_ptr, c_ptr, local_ptr, stride_b, stride_t, stride_h, S, H, local_stride, G: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """The sums of one head in float64, and in fp32 those since the first token of each group of G, both in base 2."""
    batch_head = tl.program_id(0).to(tl.int64)
    log_ptr += (batch_head // H) * stride_b + (batch_head % H) * stride_h
    c_ptr += batch_head * S
    local_ptr += batch_head * local_stride
    before = tl.zeros((1,), tl.float64)
    for t0 in tl.range(0, S, TOKENS):
        token = t0 + tl.arange(0, TOKENS)
        log = tl.load(log_ptr + token.to(tl.int64) * stride_t, mask=token < S, other=0.0).to(tl.float64) * LOG2E
        c = before + tl.cumsum(log, 0)
        before += tl.sum(log, 0)
        groups = tl.reshape(c, (TOKENS // G, G))
        start = tl.sum(tl.where(tl.arange(0, G)[None, :] == 0, groups, 0.0), 1)
        local = tl.reshape(groups - start[:, None], (TOKENS,))
        tl.store(c_ptr + token, c, mask=token < S)
        tl.store(local_ptr + token, local.to(tl.float32), mask=token < local_stride)


def launch_decays(log_alpha: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Both of the log-decays (B, S, H), (B, H, S) contiguous; `group`, a power of two, is a multiple of every tile.

    Of the fp32 ones the last group is full, so that a tile is read whole and in vectors.
    """
    batch, length, heads = log_alpha.shape
    padded = blocks(length, group) * group
    c = torch.empty(batch, heads, length, dtype=torch.float64, device=log_alpha.device)
    local = torch.empty(batch, heads, padded, dtype=torch.float32, device=log_alpha.device)

    def prepare() -> Call:
        numbers = (*log_alpha.stride(), length, heads, padded)
        return Call((batch * heads,), numbers, {"G": group, "TOKENS": max(_TOKENS, group), "num_warps": 8})

    launch(decays_kernel, (log_alpha, c, local), prepare, group)
    return c, local
