"""A window in fixed places: rings of W slots a head, in which a token takes the oldest one's slot and nothing else moves.

So lies what the convolution in front of a window reads: J − 1 tokens in J slots, so that the one a token takes is read by no program.
"""

import torch
from torch import Tensor

from mmrec.config import MMRecConfig
from mmrec.ops.window_attention import WindowState

ROW_BYTES = 64  # keys and values lie in rows of whole multiples: they are read 16 bytes a thread whatever a head's width is


class Ring:
    """The last W tokens of a layer that has a window, for `kernels_window.window_kernel`; before the first token all slots are empty.

    Args:
        config: the network's; `window` is W, `heads` H, `head_dim` K, `model_dim` D and `window_conv` J.
        batch_size: B.
        dtype: of keys and values, and of what is convolved: the weights'.
        device: where to put it.

    Attributes:
        k, v: (B, H, W, R), R the width K with zeros behind it.
        log_alpha: (B, H, W) fp32, each token's log-decay.
        decay: (B, H, W) fp32, of the tokens since, summed; −∞ where nothing was seen. Every token lowers all of them: a sum up to each
            token, of which a difference would do, loses precision as the text grows.
        position: (B, H) int32, the slot that the next token takes: the oldest one's. Of each head its own, so that the head's programs
            alone need agree on it; all are equal.
        recent: (B, J, 2D), the last tokens' q and k side by side, as the projection gave them, and a slot for the next; None: J is 1.
        recent_position: (B, H) int32, that slot, as `position`; None: J is 1.
    """

    def __init__(self, config: MMRecConfig, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.window, self.width, self.taps = config.window, config.head_dim, config.window_conv
        slots = (batch_size, config.heads, self.window)
        elements = ROW_BYTES // dtype.itemsize
        row = -(-self.width // elements) * elements
        self.k, self.v = (torch.zeros(*slots, row, dtype=dtype, device=device) for _ in range(2))
        self.log_alpha, self.decay = (torch.zeros(slots, dtype=torch.float32, device=device) for _ in range(2))
        self.position = torch.zeros(slots[:2], dtype=torch.int32, device=device)
        self.recent = self.recent_position = None
        if self.taps > 1:
            self.recent = torch.zeros(batch_size, self.taps, 2 * config.model_dim, dtype=dtype, device=device)
            self.recent_position = torch.zeros_like(self.position)
        self.clear()

    def clear(self) -> None:
        """As before the first token."""
        for tensor in (self.k, self.v, self.log_alpha, self.position, self.recent, self.recent_position):
            if tensor is not None:
                tensor.zero_()
        self.decay.fill_(float("-inf"))

    def load(self, state: WindowState, recent: Tensor | None = None) -> None:
        """Take over W − 1 tokens, and J − 1 of `BlockState.recent` (None: zeros), in the slots from 1 on; slot 0 is the next token's."""
        for ring, tokens in ((self.k, state.k), (self.v, state.v)):
            ring[:, :, 1:, : self.width] = tokens.transpose(1, 2)
        log_alpha = state.log_alpha.transpose(1, 2)
        self.log_alpha[..., 1:] = log_alpha
        since = torch.cat([log_alpha[..., 1:], torch.zeros_like(log_alpha[..., :1])], dim=-1).double().flip(-1).cumsum(-1).flip(-1)
        self.decay[..., 1:] = since.masked_fill(~state.seen.unsqueeze(1), float("-inf"))
        self.decay[..., :1] = float("-inf")
        self.position.zero_()
        if self.recent is not None and self.recent_position is not None:
            self.recent[:, 1:] = 0 if recent is None else recent
            self.recent_position.zero_()

    def state(self) -> WindowState:
        """The last W − 1 tokens, the oldest first, as new tensors; the host waits for nothing."""
        order = _oldest_first(self.position, self.window)
        k, v = (ring[..., : self.width].transpose(1, 2).index_select(1, order) for ring in (self.k, self.v))
        log_alpha, decay = (tensor.transpose(1, 2).index_select(1, order) for tensor in (self.log_alpha, self.decay))
        return WindowState(k, v, log_alpha, (decay > float("-inf")).any(-1))

    def recent_tokens(self) -> Tensor | None:
        """The last J − 1 tokens' q and k, as `BlockState.recent`, a new tensor; None: J is 1."""
        if self.recent is None or self.recent_position is None:
            return None
        return self.recent.index_select(1, _oldest_first(self.recent_position, self.taps))


def _oldest_first(position: Tensor, slots: int) -> Tensor:
    """The slots of a ring behind the next token's."""
    return (position.flatten()[0] + torch.arange(1, slots, device=position.device)) % slots
