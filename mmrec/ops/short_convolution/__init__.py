"""A few tokens of every channel mixed: the depthwise causal convolution in front of a window's addresses."""

import torch
from torch import Tensor

from mmrec.ops.common import check_scan_inputs, check_shape
from mmrec.ops.short_convolution.naive import short_convolution_naive
from mmrec.ops.short_convolution.operator import short_convolution_op

_MOST_TAPS = 16  # each is a read of the whole tile and, backward, a sum of its own

__all__ = ["last_tokens", "short_convolution", "short_convolution_naive"]


def short_convolution(x: Tensor, weight: Tensor, state: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`y_t = Σ_j w_j x_{t−j}`, j from 0 to J − 1, a number w_j a channel and tap, as in Mamba (arXiv:2312.00752), without a bias.

    Args:
        x: (B, T, C), any float dtype and strides.
        weight: (C, J), as of a `Conv1d` with C groups: the last column multiplies the token itself.
        state: (B, J − 1, C), the tokens before the first; None: zeros.
        reset: (B, T) boolean; where true a document starts: nothing before it counts from there on.

    Returns:
        `y`, (B, T, C), contiguous in the dtype of `x`, and the state after the last token, of the same dtype.

    Raises:
        ValueError: for T = 0, a wrong shape, or more than 16 taps.
    """
    check_scan_inputs("short_convolution", x, reset)
    batch, channels = x.shape[0], x.shape[2]
    if weight.ndim != 2 or not 1 <= weight.shape[-1] <= _MOST_TAPS:
        raise ValueError(f"short_convolution: weight has shape {tuple(weight.shape)}; give (C, J) with 1 to {_MOST_TAPS} taps J")
    taps = weight.shape[1]
    check_shape("short_convolution", "weight", weight, (channels, taps))
    if state is not None:
        check_shape("short_convolution", "state", state, (batch, taps - 1, channels))
    after = last_tokens(x, taps, state, reset)
    if state is None:
        return short_convolution_op(x, weight, reset), after
    x = torch.cat([state.to(x.dtype), x], dim=1)
    reset = None if reset is None else torch.nn.functional.pad(reset, (taps - 1, 0))
    return short_convolution_op(x, weight, reset)[:, taps - 1 :].contiguous(), after


def last_tokens(x: Tensor, taps: int, state: Tensor | None, reset: Tensor | None) -> Tensor:
    """The last J − 1 tokens of (B, T, C), zeros where a document starts after them or nothing was read: the state after `x`."""
    kept = taps - 1
    if x.shape[1] < kept:
        before = x.new_zeros((x.shape[0], kept, x.shape[2])) if state is None else state.to(x.dtype)
        last = torch.cat([before, x], dim=1)[:, x.shape[1] :]
    else:
        last = x[:, x.shape[1] - kept :]
    if reset is None or not kept:
        return last
    starts = torch.nn.functional.pad(reset, (kept, 0))[:, reset.shape[1] :]
    # A token counts where no document starts behind it: the starts of later ones, counted from the end.
    behind = starts.flip(1).cumsum(1).flip(1) - starts.int()
    return last.masked_fill(behind.bool().unsqueeze(-1), 0)
