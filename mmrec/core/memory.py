"""The state of a block: what a token leaves behind for the next, of a size that does not grow with the text."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from mmrec.config import MMRecConfig
from mmrec.ops.window_attention import WindowState


class BlockState(NamedTuple):
    """State of one block.

    Attributes:
        h: (B, D) fp32, the short-term memory.
        M: (B, H, K, V) fp32, the long-term memory; (B, H, 0, V) in a layer that has a window instead.
        planning: (B, D), the last output of the short-term scan as UBÖO's target sees it, in the scan's output dtype; None outside
            training. It differs from `h` by rounding and by the route of its gradient.
        window: the last W − 1 tokens' keys, values and decays, in a layer that has a window.
        recent: (B, J − 1, 2D), the last tokens' q and k side by side, as the projection gave them, where that layer convolves them.
    """

    h: Tensor
    M: Tensor
    planning: Tensor | None = None
    window: WindowState | None = None
    recent: Tensor | None = None

    def kept(self) -> tuple[Tensor, ...]:
        """What is carried from token to token in decoding, in a fixed order."""
        return (self.h, self.M, *(self.window or ()), *(() if self.recent is None else (self.recent,)))


def init_state(
    config: MMRecConfig,
    batch_size: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    layer_index: int = 0,
    window_dtype: torch.dtype | None = None,
) -> BlockState:
    """A block's state before the first token: zeros, a window in which nothing was seen.

    Args:
        config: the network's.
        batch_size: B.
        device: where to put it.
        dtype: of `h`, `M` and a window's decays.
        layer_index: which of the layers it is of.
        window_dtype: of a window's keys and values, and of what is convolved; None: `dtype`.
    """
    heads, width = config.heads, config.head_dim
    has_window = config.has_window(layer_index)
    h = torch.zeros(batch_size, config.model_dim, device=device, dtype=dtype)
    M = torch.zeros(batch_size, heads, 0 if has_window else width, width, device=device, dtype=dtype)
    if not has_window:
        return BlockState(h, M)
    tokens = (batch_size, config.window - 1)
    narrow = window_dtype or dtype
    k, v = (torch.zeros(*tokens, heads, width, device=device, dtype=narrow) for _ in range(2))
    log_alpha = torch.zeros(*tokens, heads, device=device, dtype=dtype)
    window = WindowState(k, v, log_alpha, torch.zeros(tokens, device=device, dtype=torch.bool))
    before = config.window_conv - 1
    recent = torch.zeros(batch_size, before, 2 * config.model_dim, device=device, dtype=narrow) if before else None
    return BlockState(h, M, None, window, recent)


def no_matrix(heads_BTHV: Tensor) -> Tensor:
    """`M` of a layer that has a window, (B, H, 0, V) fp32 or wider."""
    batch, _, heads, width = heads_BTHV.shape
    return heads_BTHV.new_empty((batch, heads, 0, width), dtype=torch.promote_types(heads_BTHV.dtype, torch.float32))


def detach_state(state: BlockState) -> BlockState:
    """The same values without their history: where truncated backpropagation through time cuts."""
    return _mapped(state, Tensor.detach)


def reset_state(state: BlockState, reset_B: Tensor) -> BlockState:
    """The state with the rows where `reset_B` (boolean, (B,)) is true as before the first token."""

    def cleared(tensor: Tensor) -> Tensor:
        return tensor.masked_fill(reset_B.view(-1, *[1] * (tensor.ndim - 1)), 0)

    return _mapped(state, cleared)


def _mapped(state: BlockState, function: Callable[[Tensor], Tensor]) -> BlockState:
    """The state with a function of each of its tensors."""
    window = None if state.window is None else WindowState(*map(function, state.window))
    planning, recent = (None if tensor is None else function(tensor) for tensor in (state.planning, state.recent))
    return BlockState(function(state.h), function(state.M), planning, window, recent)


def copy_state(target: Iterable[BlockState], source: Iterable[BlockState]) -> None:
    """Write a state's values into the tensors of another, layer by layer.

    Raises:
        ValueError: for layers of other shapes.
    """
    for own, given in zip(target, source, strict=True):
        shapes = [[tuple(tensor.shape) for tensor in state.kept()] for state in (own, given)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"state has h, M, a window's tensors and the tokens convolved of {shapes[1]}; give {shapes[0]}")
        for tensor, value in zip(own.kept(), given.kept(), strict=True):
            tensor.copy_(value)


def state_bytes(config: MMRecConfig, batch_size: int, *, key_bytes: int = 4, length: int | None = None) -> int:
    """Bytes of the fp32 state of a whole network for `batch_size` sequences.

    Args:
        config: the network's.
        batch_size: B.
        key_bytes: of a number of a window's keys and values, and of what is convolved; 2 in a bf16 network.
        length: tokens read, where they do not fill a window; None: they do.
    """
    windows = config.num_windows
    matrices = 4 * (config.num_layers - windows) * config.model_dim * config.head_dim
    kept = config.window - 1 if length is None else min(config.window - 1, length)
    tokens = windows * kept * (2 * key_bytes * config.model_dim + 4 * config.heads + 1)
    tokens += windows * (config.window_conv - 1) * 2 * key_bytes * config.model_dim
    return batch_size * (4 * config.num_layers * config.model_dim + matrices + tokens)
