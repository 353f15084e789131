"""MMRecBlock: one layer of the network.

x̂ = RMSNorm(x);  q, k, v, z, p, e = HEM(x̂);  log γ = decay(z, k)
h_t = (1 − γ_t) z_t σ(w_g h_{t−1} + p̄_t) + γ_t h_{t−1}                    short-term memory, elementwise
M_t = α_t M_{t−1} + k̃_t v_tᵀ,  r_t = M_tᵀ q̃_t,  q̃ = L2(q + h), k̃ = L2(k + h)   long-term memory, a matrix a head; or, in some layers,
r_t = Σ_j softmax_j(τ ⟨q̃_t, k̃_j⟩ + Σ_{i=j+1..t} log α_i) v_j    over the last W tokens j, with short convolutions of q and k in their place
x = x + W_o[σ(e) (g_r RMSNorm(r) + g_h RMSNorm(h))];  x = x + SwiGLU(RMSNorm(x))
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmrec.blocks.composition import compose
from mmrec.blocks.hem import FusedProjections, SeparateProjections, fuse, unfuse
from mmrec.blocks.linear import add_linear, is_hooked, is_plain
from mmrec.blocks.mixer import Window, mix
from mmrec.blocks.residual import RMSNorm
from mmrec.blocks.swiglu import SwiGLU
from mmrec.config import MMRecConfig, config_from_fields
from mmrec.core import uboo
from mmrec.core.decay import Float32Parameters, HeadDecay
from mmrec.core.mdi import MDI
from mmrec.core.memory import BlockState, no_matrix
from mmrec.ops.short_convolution import last_tokens
from mmrec.ops.window_attention import first_visible, next_state

_MEMORY_GAIN = 0.1  # the long-term memory earns its weight: at full weight from the first step it did harm
_WINDOW_GAIN = 1.0


class _StateGate(Float32Parameters):
    """`w_g`, how much of its own state a channel's write gate sees; starts at 0, an input gate."""

    def __init__(self, model_dim: int, learned: bool) -> None:
        super().__init__()
        self.w_g = nn.Parameter(torch.zeros(model_dim, dtype=torch.float32), requires_grad=learned)


class _Temperature(Float32Parameters):
    """`τ`, what a window's scores are multiplied by, one a head: starts at √K, as if q̃ and k̃ had unit variance a channel."""

    def __init__(self, config: MMRecConfig) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.full((config.heads,), math.log(config.head_dim) / 2, dtype=torch.float32))

    def forward(self) -> Tensor:
        return self.log_temperature.exp()


class _Convolution(Float32Parameters):
    """Gains of a few tokens' q and k in front of a window, (D, J) fp32 each; at first a token's own are 1, all others 0."""

    def __init__(self, config: MMRecConfig) -> None:
        super().__init__()
        start = torch.zeros(config.model_dim, config.window_conv, dtype=torch.float32)
        start[:, -1] = 1
        self.q_gain, self.k_gain = nn.Parameter(start), nn.Parameter(start.clone())

    def gains(self) -> tuple[Tensor, Tensor]:
        """Of q and of k."""
        return self.q_gain, self.k_gain


class MMRecBlock(nn.Module):
    """One MM-Rec block.

    Args:
        config: the network's configuration; or its fields by name, for a block on its own:
            `MMRecBlock(model_dim=4096, num_heads=8, use_hem=True, pe_dim=4096)`.
        layer_index: which of the layers it is, from 0: some have a window instead of a matrix, some no planning error.
    """

    def __init__(self, config: MMRecConfig | None = None, layer_index: int = 0, **fields: Any) -> None:
        super().__init__()
        config = config if config is not None else config_from_fields("MMRecBlock", {"num_layers": 1, **fields})
        self.config = config
        dim = config.model_dim
        self.norm = RMSNorm(dim, eps=config.norm_eps)
        kind = FusedProjections if config.use_hem else SeparateProjections
        self.projections: FusedProjections | SeparateProjections = kind(dim, config.pe_width, config.initializer_range)
        self.mdi = MDI(config, layer_index)
        self.state_gate = _StateGate(dim, learned=config.state_gate)
        self.head_decay = HeadDecay(dim, config.heads, config.initializer_range)
        self.has_window = config.has_window(layer_index)
        self.temperature = _Temperature(config) if self.has_window else None
        self.convolution = _Convolution(config) if self.has_window and config.window_conv > 1 else None
        self.g_r = nn.Parameter(torch.full((config.heads, config.head_dim), _WINDOW_GAIN if self.has_window else _MEMORY_GAIN))
        self.g_h = nn.Parameter(torch.ones(config.heads, config.head_dim))
        self.W_o = nn.Linear(dim, dim, bias=False)
        self.ffn_norm = RMSNorm(dim, eps=config.norm_eps)
        self.ffn = SwiGLU(dim, config.ffn_width, recompute=config.activation_checkpointing == "selective")
        # Both branches add to the residual 2L times: their last weights start smaller by √(2L), as in GPT-2.
        nn.init.normal_(self.ffn.W_gate_up.weight, std=config.initializer_range)
        for last in (self.W_o, self.ffn.W_down):
            nn.init.normal_(last.weight, std=config.initializer_range / math.sqrt(2 * config.num_layers))

    @property
    def use_hem(self) -> bool:
        """Whether the six projections are fused into one."""
        return isinstance(self.projections, FusedProjections)

    @use_hem.setter
    def use_hem(self, value: bool) -> None:
        raise AttributeError(f"use_hem cannot be assigned: the weights would not match; call model.set_hem({value}) to convert them")

    def set_hem(self, use_hem: bool) -> None:
        """Convert the projections in place; the optimiser's state of the old weights does not follow (see `MMRecModel.set_hem`)."""
        self.adopt_projections(self.converted_projections(use_hem))

    def converted_projections(self, use_hem: bool) -> FusedProjections | SeparateProjections:
        """This block's projections in the form asked for; the block's own where they have it already."""
        projections = self.projections
        if isinstance(projections, SeparateProjections):
            return fuse(projections) if use_hem else projections
        return projections if use_hem else unfuse(projections)

    def adopt_projections(self, projections: FusedProjections | SeparateProjections) -> None:
        """Take over what `converted_projections` made; the configuration follows."""
        self.projections = projections
        self.config = replace(self.config, use_hem=self.use_hem)

    def forward(
        self,
        x_BTD: Tensor,
        *,
        state: BlockState | None = None,
        reset: Tensor | None = None,
        return_auxiliary_loss: bool = False,
        return_state: bool = False,
        record: dict[str, Tensor] | None = None,
    ) -> Any:
        """Run the block over a sequence.

        Args:
            x_BTD: (B, T, D), any float dtype.
            state: what the tokens before left behind; None means nothing.
            reset: (B, T) boolean, true at the first token of a document.
            return_auxiliary_loss: append UBÖO's `PlanningLoss`, unscaled.
            return_state: append the `BlockState` after the last token.
            record: a dictionary to be filled with detached intermediates, for diagnostics.

        Returns:
            The output (B, T, D), or a tuple of it and what was asked for, in this order.
        """
        normed, for_decay, x_BTD, owned = self.norm.branch(x_BTD, is_plain(self.W_o))
        log_alpha = self.head_decay(for_decay)
        wanted = return_auxiliary_loss and self.mdi.use_uboo
        gated, z, h, h_target, after = self._mixed(normed, log_alpha, state, reset, wanted)
        planning: uboo.PlanningLoss | None = None
        carried: Tensor | None = None
        if wanted:
            before = None if state is None else state.planning if state.planning is not None else state.h
            planning = self.planning_error(h, h_target, before, reset, record)
            carried = h_target[:, -1]
        x_BTD = add_linear(x_BTD, gated, self.W_o, owned)
        # A hook would see the stream overwritten, and one on the way back forbids it.
        normed, _, x_BTD, owned = self.ffn_norm.branch(x_BTD, is_plain(self.ffn.W_down) and not is_hooked(self.ffn))
        x_BTD = self.ffn(normed, x_BTD, owned)
        if record is not None:
            record["gate_jacobian"] = (z.detach().float() * self.state_gate.w_g.detach() / 4).abs()

        outputs: list[Any] = [x_BTD]
        if return_auxiliary_loss:
            zero = torch.zeros((), device=x_BTD.device)
            outputs.append(planning if planning is not None else uboo.PlanningLoss(zero, zero))
        if return_state:
            # Not after._replace: torch 2.11 cannot compile it.
            outputs.append(BlockState(after.h, after.M, carried, after.window, after.recent))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def observed(self, x_BTD: Tensor, **options: Any) -> Any:
        """`forward`, for diagnostics: not by a call of the module, since a compiled block would be compiled a second time for them."""
        return self.forward(x_BTD, **options)

    def _mixed(
        self, normed: Tensor, log_alpha: Tensor, state: BlockState | None, reset: Tensor | None, planned: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, BlockState]:
        """Gated read-out, z, `h`, `h` as the planning target sees it, and the last state: the operators in one function."""
        if not self.config.state_gate or (self.has_window and state is not None):
            return self._composed(normed, log_alpha, state, reset, planned)
        whole, parts = self.projections.whole_and_parts(normed)
        decay, context = self.mdi.gates()
        h0, M0 = (None, None) if state is None else (state.h, state.M)
        orthogonalize = planned and self.config.orthogonalize
        tokens, window, first = self.config.window, None, None
        if self.temperature is not None:
            first = first_visible(normed, tokens, None, reset)
            gains = (None, None) if self.convolution is None else self.convolution.gains()
            window = Window(self.temperature(), tokens, first, *gains)
        gated, h, h_last, memory = mix(
            whole,
            parts,
            log_alpha,
            decay,
            context,
            self.state_gate.w_g,
            self.g_r,
            self.g_h,
            h0,
            M0,
            reset,
            window=window,
            eps=self.config.norm_eps,
            orthogonalize=orthogonalize,
            recompute=self.config.activation_checkpointing == "selective",
        )
        if window is None:
            return gated, parts.z, h, h, BlockState(h_last, memory)
        values = parts.v.unflatten(-1, (self.config.heads, self.config.head_dim))
        recent = None if self.convolution is None else last_tokens([parts.q, parts.k], self.config.window_conv, None, reset)
        after = BlockState(h_last, no_matrix(memory), None, next_state(memory, values, log_alpha, first, tokens), recent)
        return gated, parts.z, h, h, after

    def _composed(
        self, normed: Tensor, log_alpha: Tensor, state: BlockState | None, reset: Tensor | None, planned: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, BlockState]:
        """The same, each operator differentiated on its own."""
        parts = self.projections(normed)
        gated, h, h_target, after = compose(self, parts, log_alpha, state, reset, planned and self.config.orthogonalize)
        return gated, parts.z, h, h_target, after

    def planning_error(
        self, h: Tensor, h_target: Tensor, before: Tensor | None, reset: Tensor | None, record: dict[str, Tensor] | None = None
    ) -> uboo.PlanningLoss:
        """UBÖO's loss of this block; `h_target` is `h` as the gradient of the planning target may reach it."""
        weights = (self.mdi.W_planning_error, self.mdi.W_planning_target)
        counted = uboo.counted_tokens(h, before, reset)
        if self.config.planning_loss == "mse":
            loss = uboo.literal_loss(*weights, h, h_target, before, counted)
            target = None if record is None else self.mdi.W_planning_target(uboo.shift(h_target, before))
        else:
            loss, target = uboo.normalized_loss(*weights, h, uboo.shift(h_target, before), counted)
        if record is not None and target is not None:
            record["planning_target"] = target.detach()
            record["counted"] = counted
        return loss
