"""A few tokens of every channel mixed: the depthwise causal convolution in front of a window's addresses."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrec.ops.common import behind, check_scan_inputs, check_shape
from mmrec.ops.short_convolution.naive import short_convolution_naive
from mmrec.ops.short_convolution.operator import short_convolution_op

_MOST_TAPS = 16  # each is a read of the whole tile and, backward, a sum of its own

__all__ = ["last_tokens", "short_convolution", "short_convolution_naive"]


def short_convolution(x: Tensor, weight: Tensor, state: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`y_t = Σ_j w_j x_{t−j}`, j from 0 to J − 1, a number w_j a channel and tap, as in Mamba (arXiv:2312.00752), without a bias.

    Args:
        x: (B, T, C), any float dtype and strides.
        weight: (C, J), as of a `Conv1d` with C groups: the last column multiplies the token itself.
        state: (B, J − 1, C), the tokens before the first, rounded to the dtype of `x`; None: zeros.
        reset: (B, T) boolean; where true a document starts: nothing before it counts from there on.

    Returns:
        `y`, (B, T, C), contiguous in the dtype of `x`, and the state after the last token, of the same dtype: a view of `x` where this has
        J − 1 tokens, to be cloned by who keeps it longer.

    Raises:
        ValueError: for T = 0, a wrong shape, or more than 16 taps.
    """
    check_scan_inputs("short_convolution", x, reset)
    batch, _, channels = x.shape
    if weight.ndim != 2 or not 1 <= weight.shape[-1] <= _MOST_TAPS:
        raise ValueError(f"short_convolution: weight has shape {tuple(weight.shape)}; give (C, J) with 1 to {_MOST_TAPS} taps J")
    taps = weight.shape[1]
    check_shape("short_convolution", "weight", weight, (channels, taps))
    if state is not None:
        check_shape("short_convolution", "state", state, (batch, taps - 1, channels))
    after = last_tokens([x], taps, state, reset)
    if state is None:
        return short_convolution_op(x, weight, reset), after
    starts = None if reset is None else F.pad(reset, (taps - 1, 0))
    return short_convolution_op(behind(state, x), weight, starts)[:, taps - 1 :].contiguous(), after


def last_tokens(parts: Sequence[Tensor], taps: int, state: Tensor | None, reset: Tensor | None) -> Tensor:
    """The state after a sequence, (B, J − 1, C): its last tokens, zeros where a document starts after them or nothing was read.

    Args:
        parts: (B, T, ·) each, together C channels of the sequence side by side; of one alone no copy is made.
        taps: J.
        state, reset: as of `short_convolution`.
    """
    kept, time = taps - 1, parts[0].shape[1]
    ends = [part[:, max(0, time - kept) :] for part in parts]
    last = ends[0] if len(ends) == 1 else torch.cat(ends, dim=-1)
    if time < kept:
        last = F.pad(last, (0, 0, kept, 0)) if state is None else behind(state, last)
        last = last[:, last.shape[1] - kept :]
    if reset is None or not kept:
        return last
    starts = F.pad(reset, (kept, 0))[:, time:]
    # A token counts where no document starts behind it: the starts of later ones, counted from the end.
    later = starts.flip(1).cumsum(1).flip(1) - starts.int()
    return last.masked_fill(later.bool().unsqueeze(-1), 0)
