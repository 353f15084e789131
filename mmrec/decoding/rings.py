"""A window in fixed places: rings of W slots a head, in which a token takes the oldest one's slot and nothing else moves."""

import torch

from mmrec.config import MMRecConfig
from mmrec.ops.window_attention import WindowState

ROW_BYTES = 64  # keys and values lie in rows of whole multiples: they are read 16 bytes a thread whatever a head's width is


class Ring:
    """The last W tokens of a layer that has a window, for `kernels_window.window_kernel`; before the first token all slots are empty.

    Args:
        config: the network's; `window` is W, `heads` H and `head_dim` K.
        batch_size: B.
        dtype: of keys and values, the weights'.
        device: where to put it.

    Attributes:
        k, v: (B, H, W, R), R the width K with zeros behind it.
        log_alpha: (B, H, W) fp32, each token's log-decay.
        decay: (B, H, W) fp32, of the tokens since, summed; −∞ where nothing was seen. Every token lowers all of them: a sum up to each
            token, of which a difference would do, loses precision as the text grows.
        position: (B, H) int32, the slot that the next token takes: the oldest one's. Of each head its own, so that the head's programs
            alone need agree on it; all are equal.
    """

    def __init__(self, config: MMRecConfig, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.window, self.width = config.window, config.head_dim
        slots = (batch_size, config.heads, self.window)
        elements = ROW_BYTES // dtype.itemsize
        row = -(-self.width // elements) * elements
        self.k, self.v = (torch.zeros(*slots, row, dtype=dtype, device=device) for _ in range(2))
        self.log_alpha, self.decay = (torch.zeros(slots, dtype=torch.float32, device=device) for _ in range(2))
        self.position = torch.zeros(slots[:2], dtype=torch.int32, device=device)
        self.clear()

    def clear(self) -> None:
        """As before the first token."""
        for tensor in (self.k, self.v, self.log_alpha, self.position):
            tensor.zero_()
        self.decay.fill_(float("-inf"))

    def load(self, state: WindowState) -> None:
        """Take over a state's W − 1 tokens, in the slots from 1 on; slot 0 is the next token's."""
        for ring, tokens in ((self.k, state.k), (self.v, state.v)):
            ring[:, :, 1:, : self.width] = tokens.transpose(1, 2)
        log_alpha = state.log_alpha.transpose(1, 2)
        self.log_alpha[..., 1:] = log_alpha
        since = torch.cat([log_alpha[..., 1:], torch.zeros_like(log_alpha[..., :1])], dim=-1).double().flip(-1).cumsum(-1).flip(-1)
        self.decay[..., 1:] = since.masked_fill(~state.seen.unsqueeze(1), float("-inf"))
        self.decay[..., :1] = float("-inf")
        self.position.zero_()

    def state(self) -> WindowState:
        """The last W − 1 tokens, the oldest first, as new tensors; the host waits for nothing."""
        slots = torch.arange(1, self.window, device=self.position.device)
        order = (self.position.flatten()[0] + slots) % self.window
        k, v = (ring[..., : self.width].transpose(1, 2).index_select(1, order) for ring in (self.k, self.v))
        log_alpha, decay = (tensor.transpose(1, 2).index_select(1, order) for tensor in (self.log_alpha, self.decay))
        return WindowState(k, v, log_alpha, (decay > float("-inf")).any(-1))
