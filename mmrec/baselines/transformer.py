"""Transformer++: rotary embeddings, RMSNorm, SwiGLU, causal attention; the layers are those of Hugging Face's Llama."""

from typing import Any

import torch
from torch import Tensor, nn

from mmrec.baselines.config import BaselineConfig


class _Layer(nn.Module):
    """A Llama layer with the rotary embedding of its positions.

    LlamaModel itself would look for padding and packed documents in every forward, which waits for the device.
    """

    def __init__(self, layer: nn.Module, rotary: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.rotary = rotary  # shared, without parameters

    def forward(self, x_BTD: Tensor) -> Tensor:
        positions = torch.arange(x_BTD.shape[1], device=x_BTD.device).unsqueeze(0)
        output: Any = self.layer(x_BTD, attention_mask=None, position_embeddings=self.rotary(x_BTD, positions), use_cache=False)
        return output[0] if isinstance(output, tuple) else output


def transformer_layers(config: BaselineConfig) -> nn.ModuleList:
    """The L layers.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    try:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
    except ImportError as error:
        raise ModuleNotFoundError(f"the baseline transformer++ needs transformers ({error}); pip install transformers") from error
    llama = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.model_dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        max_position_embeddings=config.max_length,
        rms_norm_eps=config.norm_eps,
        attn_implementation="sdpa",
    )
    rotary = LlamaRotaryEmbedding(llama)
    return nn.ModuleList(_Layer(LlamaDecoderLayer(llama, index), rotary) for index in range(config.num_layers))
