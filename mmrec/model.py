"""MMRecModel: embedding, blocks, norm, head; loss, state and one-token step."""

import warnings
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from mmrec.blocks.mm_rec_block import MMRecBlock
from mmrec.blocks.residual import RMSNorm, embed
from mmrec.config import MMRecConfig, config_from_fields, warn_about_lambda_P
from mmrec.core import memory, uboo
from mmrec.core.cross_entropy import linear_cross_entropy
from mmrec.core.memory import BlockState
from mmrec.core.uboo import PlanningLoss

# Which only training needs, by the ends of their names.
PLANNING_WEIGHTS = ("mdi.W_planning_error.weight", "mdi.W_planning_target.weight")


class LossOutput(NamedTuple):
    """What `MMRecModel.loss` returns.

    Attributes:
        loss: 0-dim fp32, `main + auxiliary`.
        main: 0-dim fp32, the cross-entropy in nats a token.
        auxiliary: 0-dim fp32, λ_P times the layers' planning errors; 0 where `use_uboo` is false.
        auxiliary_by_layer: (L,) fp32, each layer's planning error, unscaled, 0 where it has none.
        num_tokens: 0-dim int64, labels that counted.
        diagnostics: {} or tensors (L,): see `MMRecModel.diagnose`.
    """

    loss: Tensor
    main: Tensor
    auxiliary: Tensor
    auxiliary_by_layer: Tensor
    num_tokens: Tensor
    diagnostics: dict[str, Tensor]

    def detach(self) -> "LossOutput":
        """The same values without their history."""
        loss, main, auxiliary, by_layer, count, diagnostics = self
        found = {name: value.detach() for name, value in diagnostics.items()}
        return LossOutput(loss.detach(), main.detach(), auxiliary.detach(), by_layer.detach(), count.detach(), found)


class MMRecModel(nn.Module):
    """The MM-Rec language model.

    Args:
        config: sizes and mechanisms; or its fields by name: `MMRecModel(vocab_size=32000, model_dim=4096, num_layers=24, use_hem=True)`.

    Attributes:
        blocks: the L layers.
        use_uboo: whether the planning error exists.
        lambda_P: its weight; may be assigned, to anneal it.
    """

    def __init__(self, config: MMRecConfig | None = None, **fields: Any) -> None:
        super().__init__()
        if config is not None and fields:
            raise TypeError("give MMRecModel a config or its fields, not both")
        config = config if config is not None else config_from_fields("MMRecModel", fields)
        self.config = config
        self.lambda_P = config.lambda_P
        self.embedding = nn.Embedding(config.vocab_size, config.model_dim)
        nn.init.normal_(self.embedding.weight, std=config.initializer_range)
        self.blocks: nn.ModuleList = nn.ModuleList(MMRecBlock(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.model_dim, eps=config.norm_eps)
        self.head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        else:
            nn.init.normal_(self.head.weight, std=config.initializer_range)
        if config.use_uboo:
            warn_about_lambda_P(config.lambda_P, self.num_parameters())

    @property
    def use_uboo(self) -> bool:
        """Whether there is a planning error."""
        return self.config.use_uboo

    @property
    def use_hem(self) -> bool:
        """Whether every block's projections are fused; `set_hem` converts them."""
        return self.config.use_hem

    @property
    def num_layers(self) -> int:
        """L."""
        return self.config.num_layers

    def set_hem(self, use_hem: bool) -> None:
        """Convert every block's projections between the fused and the separate form; the function stays the same to rounding.

        An optimiser made before still holds the old weights: make it anew.

        Raises:
            ValueError: where a block has trained beyond what separate projections can express; where weights lie in shards.
        """
        if isinstance(self.embedding.weight, DTensor):
            raise ValueError("set_hem cannot convert weights that lie in shards; set model.network.use_hem before training")
        if all(block.use_hem == use_hem for block in self.blocks):
            return
        blocks = cast("list[MMRecBlock]", list(self.blocks))
        converted = [block.converted_projections(use_hem) for block in blocks]  # all or none
        for block, projections in zip(blocks, converted, strict=True):
            block.adopt_projections(projections)
        self.config = replace(self.config, use_hem=use_hem)
        warnings.warn("set_hem changed the parameters: make the optimiser anew, its state is not converted", stacklevel=2)

    def forward(
        self,
        input_ids: Tensor,
        *,
        reset: Tensor | None = None,
        state: list[BlockState] | None = None,
        chunk_size: int | None = None,
        return_auxiliary_loss: bool = False,
        return_state: bool = False,
    ) -> Any:
        """Logits of the next token at every position.

        Args:
            input_ids: (B, T) int64, in [0, vocab_size).
            reset: (B, T) boolean, true at the first token of a document: its state starts at zero.
            state: one `BlockState` a layer, from `return_state` or `init_state`; None means nothing was read before.
            chunk_size: tokens run at a time; beyond its logits, memory does not grow with T (without gradients).
            return_auxiliary_loss: append L_Aux_total, 0-dim, scaled by λ_P; 0 where `use_uboo` is false.
            return_state: append the state after the last token.

        Returns:
            Logits (B, T, vocab_size), contiguous, or a tuple of them and what was asked for, in this order.

        Raises:
            ValueError: for T = 0, a wrong shape or dtype, a `chunk_size` below 1, a state of another number of layers.
        """
        self._check(input_ids, reset, state, chunk_size)
        size = chunk_size if chunk_size is not None else input_ids.shape[1]
        logits, planning = [], None
        for start in range(0, input_ids.shape[1], size):
            piece = slice(start, start + size)
            hidden, losses, state = self._hidden(
                input_ids[:, piece], None if reset is None else reset[:, piece], state, return_auxiliary_loss
            )
            planning = losses if planning is None else [a.plus(b) for a, b in zip(planning, losses, strict=True)]
            logits.append(self.head(hidden))
        outputs: list[Any] = [torch.cat(logits, dim=1) if len(logits) > 1 else logits[0].contiguous()]
        if return_auxiliary_loss:
            outputs.append(self._auxiliary_total(self._by_layer(planning)))
        if return_state:
            outputs.append(state)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def loss(self, batch: dict[str, Tensor], diagnostics: bool = False) -> LossOutput:
        """The training loss of a batch, without the logits of the whole batch.

        Args:
            batch: "input_ids" and "labels", (B, T) int64, labels already shifted by one, −1 where nothing is to be learned; "reset",
                (B, T) boolean, if documents start within the sequences.
            diagnostics: also run `diagnose` on the batch.
        """
        input_ids, labels, reset = batch["input_ids"], batch["labels"], batch.get("reset")
        self._check(input_ids, reset, None, None)
        hidden, planning, _ = self._hidden(input_ids, reset, None, with_planning=self.use_uboo)
        main, count = linear_cross_entropy(hidden.flatten(0, 1), self.head.weight, labels.flatten(), self.config.loss_chunk_size)
        by_layer = self._by_layer(planning)
        auxiliary = self._auxiliary_total(by_layer)
        return LossOutput(main + auxiliary, main, auxiliary, by_layer, count, self.diagnose(batch) if diagnostics else {})

    def init_state(self, batch_size: int, device: torch.device | str | None = None) -> list[BlockState]:
        """The state before the first token: zeros in fp32 (float64 for a float64 network), windows' tokens in the weights' dtype."""
        weight = self.embedding.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        device = device if device is not None else weight.device
        return [
            memory.init_state(self.config, batch_size, device, dtype, layer_index=index, window_dtype=weight.dtype)
            for index in range(self.num_layers)
        ]

    def hidden_states(
        self, input_ids: Tensor, *, reset: Tensor | None = None, state: list[BlockState] | None = None
    ) -> tuple[Tensor, list[BlockState]]:
        """What the head would read, (B, T, D), and the state after it: for reading a text of which not every logit is wanted."""
        self._check(input_ids, reset, state, None)
        hidden, _, state = self._hidden(input_ids, reset, state, with_planning=False)
        return hidden, state

    def step(self, token_ids: Tensor, state: list[BlockState]) -> tuple[Tensor, list[BlockState]]:
        """One token: (B,) int64 and a state to the next token's logits (B, vocab_size) and the state after it."""
        logits, state = self(token_ids.unsqueeze(1), state=state, return_state=True)
        return logits[:, 0], state

    @torch.no_grad()
    def diagnose(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the losses do not show, by one more forward pass; each a tensor (L,), fp32.

        `gate_jacobian_max` and `gate_jacobian_share`: the largest |z·w_g|/4 and the share above 1, where the short-term memory's
        gradient is no longer bounded. With UBÖO also `target_variance` and `target_effective_rank` of the planning target: both
        fall towards 0 and 1 where it collapses, and are 0 in layers without one.
        """
        rows: dict[str, list[Tensor]] = {}
        x = self._embed(batch["input_ids"])
        for block in cast("list[MMRecBlock]", list(self.blocks)):
            record: dict[str, Tensor] = {}
            x, _ = block.observed(x, reset=batch.get("reset"), return_auxiliary_loss=True, record=record)
            jacobian = record["gate_jacobian"]
            rows.setdefault("gate_jacobian_max", []).append(jacobian.amax())
            rows.setdefault("gate_jacobian_share", []).append((jacobian > 1).float().mean())
            if self.use_uboo:
                variance = rank = jacobian.new_zeros(())
                if "planning_target" in record:
                    variance, rank = uboo.target_statistics(record["planning_target"], record["counted"])
                rows.setdefault("target_variance", []).append(variance)
                rows.setdefault("target_effective_rank", []).append(rank)
        return {name: torch.stack(values) for name, values in rows.items()}

    def num_parameters(self, training_only: bool = True) -> int:
        """How many weights there are; `training_only=False` leaves out UBÖO's, which only training needs."""
        return sum(p.numel() for name, p in self.named_parameters() if training_only or not name.endswith(PLANNING_WEIGHTS))

    def inference_state_dict(self) -> dict[str, Tensor]:
        """The weights that inference needs: all but UBÖO's. They load into a network with `use_uboo=False`."""
        return {name: value for name, value in self.state_dict().items() if not name.endswith(PLANNING_WEIGHTS)}

    def no_weight_decay_parameters(self) -> set[str]:
        """Names of the parameters that weight decay must leave alone: norms, biases, gains, the gates' time constants."""
        gains = ("g_r", "g_h", "q_gain", "k_gain")  # a row a head or channel: the only ones that are no vectors
        return {name for name, p in self.named_parameters() if p.ndim < 2 or name.rpartition(".")[2] in gains}

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of one training step (forward and backward) a token: MFU's numerator.

        6 for every weight of a matrix product (the head once, the embedding's look-up not at all), and three times the forward of the
        operators: 4·K·V a head for the long-term memory, 4·V for every token seen where it is a window, about 12 a channel for the
        short-term one, 4·J a channel for a window's convolutions of J tokens. Recomputation is not counted. Only windows that a sequence
        does not fill depend on `seq_len`.
        """
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}; give at least 1")
        config = self.config
        matrices = sum(p.numel() for name, p in self.named_parameters() if name.rpartition(".")[2] in ("weight", "w_alpha") and p.ndim == 2)
        if not config.tie_embeddings:
            matrices -= self.embedding.weight.numel()
        inside = min(seq_len, config.window)
        seen = inside * (1 - (inside - 1) / (2 * seq_len))  # tokens that a token of a sequence sees on average
        windows = config.num_windows
        reads = (config.num_layers - windows) * config.head_dim + windows * seen
        taps = config.window_conv if config.window_conv > 1 else 0
        operators = round(config.model_dim * (4 * reads + 12 * config.num_layers + 4 * taps * windows))
        return 6 * matrices + 3 * operators

    def state_bytes(self, batch_size: int) -> int:
        """Bytes of the state carried from token to token for `batch_size` sequences."""
        return memory.state_bytes(self.config, batch_size)

    def _hidden(
        self, input_ids: Tensor, reset: Tensor | None, state: list[BlockState] | None, with_planning: bool
    ) -> tuple[Tensor, list[PlanningLoss], list[BlockState]]:
        """The normed last hidden states, each block's planning error and each block's state."""
        x = self._embed(input_ids)
        planning, states = [], []
        recompute = self.config.activation_checkpointing is True and self.training and torch.is_grad_enabled()
        for index, block in enumerate(self.blocks):
            options: dict[str, Any] = {
                "state": None if state is None else state[index],
                "reset": reset,
                "return_auxiliary_loss": with_planning,
                "return_state": True,
            }
            # No random state to keep: nothing is drawn in a block, and within a CUDA graph it could not be read.
            result = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, **options) if recompute else block(x, **options)
            x = result[0]
            if with_planning:
                planning.append(result[1])
            states.append(result[-1])
        return self.norm(x), planning, states

    def _embed(self, input_ids: Tensor) -> Tensor:
        return embed(self.embedding, input_ids, self.config.input_scale)

    def _by_layer(self, planning: list[PlanningLoss] | None) -> Tensor:
        """(L,) fp32: each block's mean planning error, zeros where there is none."""
        if not planning:
            return torch.zeros(self.num_layers, device=self.embedding.weight.device)
        return torch.stack([loss.mean() for loss in planning])

    def _auxiliary_total(self, by_layer: Tensor) -> Tensor:
        planned = by_layer[self.config.first_planning_layer :]
        joined = planned.sum() if self.config.planning_reduction == "sum" else planned.mean()
        return self.lambda_P * joined

    def _check(self, input_ids: Tensor, reset: Tensor | None, state: list[BlockState] | None, chunk_size: int | None) -> None:
        if input_ids.ndim != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; give (B, T) with T of at least 1")
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids has dtype {input_ids.dtype}; give token ids as int64")
        if reset is not None and (reset.shape != input_ids.shape or reset.dtype != torch.bool):
            raise ValueError(
                f"reset has dtype {reset.dtype} and shape {tuple(reset.shape)}; give a boolean mask of shape {tuple(input_ids.shape)}"
            )
        if state is not None and len(state) != self.num_layers:
            raise ValueError(f"state has {len(state)} layers, the network {self.num_layers}; give one BlockState a layer")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}; give at least 1")
