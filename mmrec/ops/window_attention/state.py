"""What a window leaves to the tokens after it, and what a query sees of its window."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class WindowState(NamedTuple):
    """The last P = W − 1 tokens, the oldest first.

    Attributes:
        k: (B, P, H, K), keys.
        v: (B, P, H, V), values.
        log_alpha: (B, P, H), log-decays, fp32 or wider.
        seen: (B, P) boolean; false, from the oldest on, where nothing was read yet or a document's start lies behind.
    """

    k: Tensor
    v: Tensor
    log_alpha: Tensor
    seen: Tensor


def first_visible(q: Tensor, window: int, seen: Tensor | None, reset: Tensor | None) -> Tensor | None:
    """The first token that each query sees, (B, T) int32, counted from the state's oldest one, which is W − 1 before the sequence.

    None where the window alone decides: neither a state nor document starts.
    """
    if seen is None and reset is None:
        return None
    past = 0 if seen is None else window - 1
    token = torch.arange(past, past + q.shape[1], dtype=torch.int32, device=q.device)
    first = (token - (window - 1)).clamp(min=0).expand(q.shape[:2])
    if reset is not None:
        first = torch.maximum(first, torch.where(reset, token, 0).cummax(1).values)
    if seen is not None and past:
        # Unseen tokens are the oldest: all before the last of them are.
        begin = torch.where(seen, 0, torch.arange(1, past + 1, dtype=torch.int32, device=q.device)).amax(1, keepdim=True)
        first = torch.maximum(first, begin)
    return first.contiguous()


def next_state(k: Tensor, v: Tensor, log_alpha: Tensor, first: Tensor | None, window: int) -> WindowState:
    """The state after the last of S tokens, zeros where there are fewer than W − 1; see the public function."""
    batch, length = k.shape[:2]
    begin = length - (window - 1)

    def last(tensor: Tensor) -> Tensor:
        if begin >= 0:
            return tensor[:, begin:]
        return F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (-begin, 0))

    token = torch.arange(begin, length, dtype=torch.int32, device=k.device)
    seen = (token >= (0 if first is None else first[:, -1:])).expand(batch, window - 1)
    return WindowState(last(k), last(v), last(log_alpha).to(torch.promote_types(log_alpha.dtype, torch.float32)), seen)
