"""Gated DeltaNet and GLA, the layers of flash-linear-attention; on a GPU only."""

from typing import Any

from torch import Tensor, nn

from mmrec.baselines.config import BaselineConfig


class _Layer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_BTD: Tensor) -> Tensor:
        output: Any = self.layer(x_BTD, use_cache=False)[0]
        return output


def linear_attention_layers(config: BaselineConfig) -> nn.ModuleList:
    """The L layers, in the proportions of their papers: values twice as wide as keys, convolutions of width 4 before Gated DeltaNet.

    Raises:
        ModuleNotFoundError: flash-linear-attention is not installed.
    """
    try:
        from fla.models.gated_deltanet.configuration_gated_deltanet import GatedDeltaNetConfig
        from fla.models.gated_deltanet.modeling_gated_deltanet import GatedDeltaNetModel
        from fla.models.gla.configuration_gla import GLAConfig
        from fla.models.gla.modeling_gla import GLAModel
    except ImportError as error:
        needs = f"the baseline {config.kind} needs flash-linear-attention ({error})"
        raise ModuleNotFoundError(f"{needs}; pip install flash-linear-attention") from error
    common: dict[str, Any] = {
        "vocab_size": 1,  # the embedding is ours
        "hidden_size": config.model_dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_heads": config.num_heads,
        "norm_eps": config.norm_eps,
        "use_cache": False,
    }
    if config.kind == "gated-deltanet":
        # Keys three quarters as wide as the stream, values one and a half times (arXiv:2412.06464): 6 D² a layer.
        layers = GatedDeltaNetModel(GatedDeltaNetConfig(head_dim=3 * config.model_dim // (4 * config.num_heads), **common)).layers
    else:
        layers = GLAModel(GLAConfig(**common)).layers
    return nn.ModuleList(_Layer(layer) for layer in layers)
