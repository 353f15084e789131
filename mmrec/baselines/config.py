"""Sizes of a baseline."""

from dataclasses import dataclass
from typing import Literal

KINDS = ("transformer++", "gated-deltanet", "gla")


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """Sizes of a baseline, named as MMRecConfig's.

    Attributes:
        kind: "transformer++", Llama's layers by Hugging Face's transformers; "gated-deltanet" (arXiv:2412.06464) or "gla"
            (arXiv:2312.06635), by flash-linear-attention, which needs a GPU.
        vocab_size: number of tokens the tokenizer knows.
        model_dim: D, channels of the residual stream.
        num_layers: L.
        num_heads: H, heads of the mixer.
        ffn_dim: hidden width of the SwiGLU feed-forward.
        max_length: the longest sequence, for the rotary embedding.
        norm_eps: ε of every RMSNorm.
        initializer_range: standard deviation of the weights at the start; the last weights of both branches start smaller by √(2L).
        embedding_scale: what the embedding is multiplied by where it enters the stream.
        loss_chunk_size: tokens whose logits exist at a time in the training loss.
    """

    kind: Literal["transformer++", "gated-deltanet", "gla"] = "transformer++"
    vocab_size: int = 32000
    model_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    ffn_dim: int = 2048
    max_length: int = 2048
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    embedding_scale: float = 1.0
    loss_chunk_size: int = 2048

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; choose one of {', '.join(KINDS)}")
        for name in ("vocab_size", "model_dim", "num_layers", "num_heads", "ffn_dim", "max_length", "loss_chunk_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; give a whole number of at least 1")
        if self.model_dim % self.num_heads:
            raise ValueError(f"num_heads = {self.num_heads} does not divide model_dim = {self.model_dim}; choose a divisor")
