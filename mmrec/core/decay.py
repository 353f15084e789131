"""Decays in the log domain: how they are bounded, how they start, and the long-term memory's decay of a head."""

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from mmrec.ops import head_decay

# Below lies nothing worth carrying; at 0 nothing would be written.
LOG_GAMMA_MIN = math.log(1e-6)
LOG_GAMMA_MAX = -1e-6
# Tokens. Short: what lies further back is the long-term memory's; by measured loss (docs/log.md) 2 … 2048 was worse by 0.05.
SHORT_TERM_TIME_CONSTANTS = (1.5, 16.0)
LONG_TERM_TIME_CONSTANTS = (8.0, 2048.0)  # tokens


class Float32Parameters(nn.Module):
    """A module whose own parameters stay in fp32 (or wider) whatever dtype the network is cast to.

    A decay's bias in bf16 moves in steps of 3 % of its time constant and stands still under a small learning rate.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.is_floating_point() and moved.dtype in (torch.bfloat16, torch.float16):
                return tensor.to(device=moved.device, dtype=torch.float32)
            return moved

        return super()._apply(keep_wide, recurse)


class DecayBias(Float32Parameters):
    """A bias of D decay logits, kept in fp32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(channels, dtype=torch.float32))


def spread_time_constants(count: int, bounds: tuple[float, float], groups: int = 1) -> Tensor:
    """Time constants in tokens, log-uniform over `bounds`, float64 (count,).

    Each of `groups` neighbouring groups of channels (heads) gets the whole range, not a part of it.
    """
    low, high = (math.log(bound) for bound in bounds)
    steps = count // groups
    quantiles = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    return (low + quantiles * (high - low)).exp().repeat(groups)


class HeadDecay(Float32Parameters):
    """`log α = −exp(A_log) · softplus(w_α·x̂ + dt_bias)`, one decay a head (the parametrisation of Mamba-2, arXiv:2405.21060)."""

    def __init__(self, model_dim: int, num_heads: int, initializer_range: float) -> None:
        super().__init__()
        self.initializer_range = initializer_range
        self.w_alpha = nn.Parameter(torch.empty(num_heads, model_dim, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Time constants log-uniform over 8 … 2048 tokens."""
        nn.init.normal_(self.w_alpha, std=self.initializer_range)
        nn.init.zeros_(self.A_log)
        rate = 1 / spread_time_constants(self.dt_bias.numel(), LONG_TERM_TIME_CONSTANTS)
        self.dt_bias.copy_(torch.log(torch.expm1(rate)))  # softplus⁻¹

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) of any float dtype to log α, (B, T, H), in the parameters' dtype (fp32)."""
        return head_decay(x_BTD, self.w_alpha, self.A_log, self.dt_bias)
