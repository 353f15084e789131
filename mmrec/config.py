"""The network's configuration: sizes and mechanisms, checked before anything is built. No optimiser, no paths."""

import math
import warnings
from dataclasses import dataclass, fields
from typing import Any, Literal

from mmrec.nearest import nearest_name

_WINDOW_EVERY = 3
_MOST_TAPS = 16  # of a convolution: each is a read of the whole tensor
_HEAD_WIDTH = 128  # the width aimed at where num_heads is not given
_FFN_MULTIPLE = 256  # feed-forward widths are rounded to this, for the matrix units' tiles


@dataclass(frozen=True, kw_only=True)
class MMRecConfig:
    """Sizes and mechanisms of an MM-Rec network.

    Attributes:
        vocab_size: number of tokens the tokenizer knows.
        model_dim: D, channels of the residual stream and of the short-term memory.
        num_layers: L, blocks.
        num_heads: H, heads of the long-term memory; each is D/H wide. None: max(1, D // 128).
        ffn_dim: F, hidden width of the SwiGLU feed-forward. None: 8D/3 to the nearest multiple of 256.
        use_hem: one fused projection instead of six.
        pe_dim: P, width of the path that says when the short-term memory writes; divides D. None: D.
        use_dpg: the decay from a low-rank gate (DPG) instead of the two-factor form (MDI).
        dpg_rank: R, rank of the DPG gate.
        window_every: every so-manieth layer's long-term memory is a window: softmax attention to the last tokens, exact, where the others
            keep a matrix of everything, inexact. By measured loss (docs/log.md): none is worse by 0.1. None, or the default
            where there are fewer layers than that: no layer's; others must not be above num_layers.
        window: tokens such a layer sees, W.
        window_conv: tokens that its queries and keys are mixed of before they are addresses, a convolution a channel; 1: none.
        state_gate: whether the state gates its own write (w_g is learned); false makes the recurrence linear.
        decay_accum_dtype: in which dtype the decays of a carried state are summed where `state_gate` is false.
        use_uboo: the planning error as an auxiliary loss.
        lambda_P: its weight; 0.05–0.1 below 1 B parameters, 0.1–0.2 to 7 B, 0.1–0.15 above.
        planning_loss: "mse", the literal form; "normalized", which has no trivial minimum.
        planning_layers: which layers have a planning error: "all" or the "last".
        planning_error_dim: E, width of the two planning projections. None: D.
        planning_reduction: how the losses of the layers that have one are joined, "sum" or "mean".
        orthogonalize: remove from the planning error's gradient, token by token, its part along the main gradient.
        tie_embeddings: the output head shares the embedding's weight.
        embedding_scale: what the embedding is multiplied by where it enters the stream. None: √D, so that it starts about as large as what
            the blocks add to it.
        norm_eps: ε of every RMSNorm.
        initializer_range: standard deviation of the weights at the start.
        loss_chunk_size: tokens whose logits exist at a time in the training loss.
        activation_checkpointing: what the backward forms again instead of keeping it: true, each block from its input, the least memory for
            a third more work; "selective", only what is cheap (addresses, memories, the feed-forward's gated activations): a quarter less
            memory for some 2 % more time.
    """

    vocab_size: int = 32000
    model_dim: int = 4096
    num_layers: int = 24
    num_heads: int | None = None
    ffn_dim: int | None = None
    use_hem: bool = True
    pe_dim: int | None = None
    use_dpg: bool = False
    dpg_rank: int = 128
    window_every: int | None = _WINDOW_EVERY
    window: int = 512
    window_conv: int = 4
    state_gate: bool = True
    decay_accum_dtype: Literal["float32", "float64"] = "float32"
    use_uboo: bool = True
    lambda_P: float = 0.1
    planning_loss: Literal["mse", "normalized"] = "mse"
    planning_layers: Literal["all", "last"] = "all"
    planning_error_dim: int | None = None
    planning_reduction: Literal["sum", "mean"] = "sum"
    orthogonalize: bool = False
    tie_embeddings: bool = True
    embedding_scale: float | None = None
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    loss_chunk_size: int = 2048
    activation_checkpointing: bool | Literal["selective"] = False

    def __post_init__(self) -> None:
        positive = ("vocab_size", "model_dim", "num_layers", "num_heads", "ffn_dim", "pe_dim", "dpg_rank", "planning_error_dim")
        for name in (*positive, "loss_chunk_size", "window_every", "window", "window_conv"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                none = ", or null for no windows" if name == "window_every" else ""
                raise ValueError(f"{name} is {value!r}; give a whole number of at least 1{none}")
        if self.window_every not in (None, _WINDOW_EVERY) and self.window_every > self.num_layers:
            fault = f"window_every = {self.window_every} is more than num_layers = {self.num_layers}, no layer would have a window"
            raise ValueError(f"{fault}; give at most num_layers, or null for none")
        if self.model_dim % self.heads:
            raise ValueError(f"num_heads = {self.heads} does not divide model_dim = {self.model_dim}; choose a divisor")
        if self.model_dim % self.pe_width:
            raise ValueError(f"pe_dim = {self.pe_width} does not divide model_dim = {self.model_dim}; choose a divisor")
        if self.window_conv > _MOST_TAPS:
            raise ValueError(f"window_conv = {self.window_conv} is more than {_MOST_TAPS} tokens; give at most that many")
        choices = {
            "decay_accum_dtype": ("float32", "float64"),
            "planning_loss": ("mse", "normalized"),
            "planning_layers": ("all", "last"),
            "planning_reduction": ("sum", "mean"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if self.activation_checkpointing not in (True, False, "selective"):
            raise ValueError(f"activation_checkpointing is {self.activation_checkpointing!r}; choose one of true, false, selective")
        if not 0 <= self.lambda_P < float("inf"):
            raise ValueError(f"lambda_P is {self.lambda_P}; give a finite weight of at least 0")
        for name in ("norm_eps", "initializer_range", "embedding_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}; give a finite number above 0")

    @property
    def heads(self) -> int:
        """H, with the default filled in."""
        return self.num_heads if self.num_heads is not None else max(1, self.model_dim // _HEAD_WIDTH)

    @property
    def head_dim(self) -> int:
        """K = V, channels of one head."""
        return self.model_dim // self.heads

    @property
    def ffn_width(self) -> int:
        """F, with the default filled in."""
        if self.ffn_dim is not None:
            return self.ffn_dim
        return max(1, round(8 * self.model_dim / 3 / _FFN_MULTIPLE)) * _FFN_MULTIPLE

    def has_window(self, layer_index: int) -> bool:
        """Whether a layer's long-term memory is a window; the last of every `window_every` layers' is."""
        return self.window_every is not None and (layer_index + 1) % self.window_every == 0

    @property
    def num_windows(self) -> int:
        """How many layers have a window."""
        return sum(self.has_window(index) for index in range(self.num_layers))

    @property
    def first_planning_layer(self) -> int:
        """The lowest layer with a planning error."""
        return 0 if self.planning_layers == "all" else self.num_layers - 1

    def has_planning(self, layer_index: int) -> bool:
        """Whether a layer has planning projections."""
        return self.use_uboo and layer_index >= self.first_planning_layer

    @property
    def input_scale(self) -> float:
        """The embedding's scale, with the default filled in."""
        return self.embedding_scale if self.embedding_scale is not None else math.sqrt(self.model_dim)

    @property
    def pe_width(self) -> int:
        """P, with the default filled in."""
        return self.pe_dim if self.pe_dim is not None else self.model_dim

    @property
    def planning_width(self) -> int:
        """E, with the default filled in."""
        return self.planning_error_dim if self.planning_error_dim is not None else self.model_dim


def config_from_fields(owner: str, options: dict[str, Any]) -> MMRecConfig:
    """MMRecConfig(**options) for `owner`; an unknown option is a TypeError that names the nearest one."""
    known = [field.name for field in fields(MMRecConfig)]
    for name in options:
        if name not in known:
            raise TypeError(f"{owner} has no option {name!r}; did you mean {nearest_name(name, known)!r}?")
    return MMRecConfig(**options)


def warn_about_lambda_P(lambda_P: float, parameters: int) -> None:
    """Warn where `lambda_P` lies outside the founding document's guide for a network of so many parameters."""
    billions = parameters / 1e9
    low, high = (0.05, 0.1) if billions < 1 else (0.1, 0.2) if billions <= 7 else (0.1, 0.15)
    if lambda_P and not low <= lambda_P <= high:
        warnings.warn(f"lambda_P = {lambda_P} lies outside the guide of {low} to {high} for {billions:.2g} B parameters", stacklevel=3)
