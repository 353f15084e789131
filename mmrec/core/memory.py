"""The state of a block: what a token leaves behind for the next, of a size that does not grow with the text."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmrec.config import MMRecConfig


class BlockState(NamedTuple):
    """State of one block.

    Attributes:
        h: (B, D) fp32, the short-term memory.
        M: (B, H, K, V) fp32, the long-term memory.
        planning: (B, D), the last output of the short-term scan as UBÖO's target sees it, in the scan's output dtype; None outside
            training. It differs from `h` by rounding and by the route of its gradient.
    """

    h: Tensor
    M: Tensor
    planning: Tensor | None = None


def init_state(
    config: MMRecConfig, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> BlockState:
    """A block's state before the first token: zeros."""
    shape = (batch_size, config.heads, config.head_dim, config.head_dim)
    return BlockState(torch.zeros(batch_size, config.model_dim, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))


def detach_state(state: BlockState) -> BlockState:
    """The same values without their history: where truncated backpropagation through time cuts."""
    planning = None if state.planning is None else state.planning.detach()
    return BlockState(state.h.detach(), state.M.detach(), planning)


def reset_state(state: BlockState, reset_B: Tensor) -> BlockState:
    """The state with the rows where `reset_B` (boolean, (B,)) is true set to zero."""
    planning = None if state.planning is None else state.planning.masked_fill(reset_B[:, None], 0)
    return BlockState(state.h.masked_fill(reset_B[:, None], 0), state.M.masked_fill(reset_B[:, None, None, None], 0), planning)


def state_bytes(config: MMRecConfig, batch_size: int) -> int:
    """Bytes of the fp32 state of a whole network for `batch_size` sequences."""
    return 4 * batch_size * config.num_layers * (config.model_dim + config.model_dim * config.head_dim)
