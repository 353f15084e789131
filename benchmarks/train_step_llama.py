"""The peer: Hugging Face's Llama under the same Trainer, as a user would run it, eager."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

# 24 × 1024 with separate embedding and head: 374 M parameters at a vocabulary of 32,000.
SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


class LlamaModule(LightningModule):
    """A training step of `LlamaForCausalLM`, scaled-dot-product attention, fused AdamW.

    Args:
        vocab_size: tokens of the vocabulary.
        seq_len: the longest sequence.
        tiny: two layers of width 64.
    """

    def __init__(self, vocab_size: int, seq_len: int, tiny: bool = False) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = TINY if tiny else SIZES
        config = LlamaConfig(
            vocab_size=vocab_size,
            max_position_embeddings=seq_len,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
            **sizes,
        )
        self.network = LlamaForCausalLM(config)
        self.sizes = sizes

    def flops_per_token(self, seq_len: int) -> int:
        """6 a weight of a matrix product, and causal attention: 6·L·D·T."""
        embedding = self.network.get_input_embeddings().weight.numel()
        weights = sum(parameter.numel() for parameter in self.parameters()) - embedding
        return 6 * weights + 6 * self.sizes["num_hidden_layers"] * self.sizes["hidden_size"] * seq_len

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss as the network computes it from labels, which it shifts by itself."""
        loss: Tensor = self.network(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss
        return loss

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
        """Lightning's own refuses fused AdamW in bf16-mixed."""
        if gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Fused AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=self.device.type == "cuda" or None)
