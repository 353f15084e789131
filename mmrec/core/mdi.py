"""MDI: the short-term memory's decay, in both forms, and UBÖO's two planning projections."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrec.config import MMRecConfig
from mmrec.core.decay import LOG_GAMMA_MAX, LOG_GAMMA_MIN, SHORT_TERM_TIME_CONSTANTS, DecayBias, spread_time_constants
from mmrec.core.initialization import draw_apart, empty_linear
from mmrec.ops import decay_log

_CONTEXT_BIAS = 8.0  # σ(8) = 0.99966: the context modulation starts as good as absent


class GateWeights(NamedTuple):
    """Of one decay gate: `logits = W_out act(W_in x + b_in)`, and the bias that is added where the logarithm is taken.

    Attributes:
        W_in: (G, D). b_in: (G,). W_out: (D, G). out_bias: (D,) fp32.
    """

    W_in: Tensor
    b_in: Tensor
    W_out: Tensor
    out_bias: Tensor


class _GateMLP(nn.Module):
    """`D → D/4 → D` with GELU; the last bias, in fp32, is added by who takes the logarithm."""

    def __init__(self, model_dim: int) -> None:
        super().__init__()
        hidden = max(1, model_dim // 4)
        self.W_in = nn.Linear(model_dim, hidden)
        self.W_out = nn.Linear(hidden, model_dim, bias=False)
        self.out_bias = DecayBias(model_dim)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.W_out(F.gelu(self.W_in(x)))
        return logits


class MDI(nn.Module):
    """Decay of the short-term memory and the planning projections of a block.

    DPG (`use_dpg`): `γ = σ(W_up · ReLU(W_down · z))`, D → R → D.
    MDI (otherwise): `γ = σ(mlp(z)) · σ(mlp(k))`; the second factor modulates by context and starts near 1.

    Args:
        config: the network's.
        layer_index: which of the layers it is of, from 0: some may have no planning projections.

    Attributes:
        use_uboo: whether the planning projections exist.
        planning_error_dim: E, their width.
    """

    def __init__(self, config: MMRecConfig, layer_index: int = 0) -> None:
        super().__init__()
        self.use_dpg = config.use_dpg
        self.use_uboo = config.has_planning(layer_index)
        self.planning_error_dim = config.planning_width
        self.initializer_range = config.initializer_range
        self.heads = config.heads
        dim = config.model_dim
        if config.use_dpg:
            self.W_down = nn.Linear(dim, config.dpg_rank)
            self.W_up = nn.Linear(config.dpg_rank, dim, bias=False)
            self.up_bias = DecayBias(dim)
        else:
            self.decay_mlp = _GateMLP(dim)
            self.context_mlp = _GateMLP(dim)
        if self.use_uboo:
            self.W_planning_error = empty_linear(dim, self.planning_error_dim, bias=False)
            self.W_planning_target = empty_linear(dim, self.planning_error_dim, bias=False)
            # The normalised form regresses on a projection of h_t without a gradient: were it trained, it could shrink to nothing.
            self.W_planning_error.weight.requires_grad_(config.planning_loss == "mse")
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Time constants 1/(1−γ) log-uniform over 1.5 … 16 tokens in every head; weights normal, other biases zero.

        The planning projections are drawn apart: a network without them starts with the same numbers everywhere else.
        """
        planning = [self.W_planning_error, self.W_planning_target] if self.use_uboo else []
        for module in self.modules():
            if isinstance(module, nn.Linear) and module not in planning:
                nn.init.normal_(module.weight, std=self.initializer_range)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for index, linear in enumerate(planning):
            draw_apart(linear.weight, self.initializer_range, index)
        bias = self.up_bias.bias if self.use_dpg else self.decay_mlp.out_bias.bias
        gamma = 1 - 1 / spread_time_constants(bias.numel(), SHORT_TERM_TIME_CONSTANTS, groups=self.heads)
        if not self.use_dpg:
            nn.init.constant_(self.context_mlp.out_bias.bias, _CONTEXT_BIAS)
            gamma = gamma * (1 + math.exp(-_CONTEXT_BIAS))  # so that the product of both factors has the time constant
        bias.copy_(torch.logit(gamma))

    def gates(self) -> tuple[GateWeights, GateWeights | None]:
        """The weights of `forward` for `blocks.mixer.mix`: the decay's and the context's, DPG's and None.

        The `nn.Linear` modules are not called by it: their hooks do not run.
        """

        def weights(inner: nn.Linear, outer: nn.Linear, bias: DecayBias) -> GateWeights:
            return GateWeights(inner.weight, inner.bias, outer.weight, bias.bias)

        if self.use_dpg:
            return weights(self.W_down, self.W_up, self.up_bias), None
        decay, context = self.decay_mlp, self.context_mlp
        return weights(decay.W_in, decay.W_out, decay.out_bias), weights(context.W_in, context.W_out, context.out_bias)

    def forward(self, z_BTD: Tensor, k_BTD: Tensor) -> Tensor:
        """log γ, (B, T, D), fp32, in [log 1e-6, −1e-6]."""
        low, high = LOG_GAMMA_MIN, LOG_GAMMA_MAX
        if self.use_dpg:
            return decay_log(self.W_up(F.relu(self.W_down(z_BTD))), self.up_bias.bias, low=low, high=high)
        decay, context = self.decay_mlp, self.context_mlp
        return decay_log(decay(z_BTD), decay.out_bias.bias, context(k_BTD), context.out_bias.bias, low=low, high=high)
