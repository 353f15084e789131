"""BaselineModel: an embedding, others' layers, a norm and a tied head, called and trained as MMRecModel is."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from mmrec.baselines.config import BaselineConfig
from mmrec.blocks.residual import RMSNorm, embed
from mmrec.core.cross_entropy import linear_cross_entropy
from mmrec.model import LossOutput

_LAST_OF_BRANCH = ("o_proj.weight", "down_proj.weight")  # so named by transformers and by flash-linear-attention


class BaselineModel(nn.Module):
    """A language model of another kind of layer.

    Args:
        config: kind and sizes.

    Attributes:
        blocks: the L layers; each maps the residual stream (B, T, D) to the next.
        use_uboo: false, and lambda_P 0: there is no auxiliary loss.

    Raises:
        ModuleNotFoundError: the package that the layers come from is not installed.
    """

    use_uboo = False

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        self.config = config
        self.lambda_P = 0.0
        self.embedding = nn.Embedding(config.vocab_size, config.model_dim)
        nn.init.normal_(self.embedding.weight, std=config.initializer_range)
        self.blocks: nn.ModuleList = self._layers()
        self.norm = RMSNorm(config.model_dim, eps=config.norm_eps)
        self.head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        self._start_weights()

    def _layers(self) -> nn.ModuleList:
        if self.config.kind == "transformer++":
            from mmrec.baselines.transformer import transformer_layers

            return transformer_layers(self.config)
        from mmrec.baselines.linear_attention import linear_attention_layers

        return linear_attention_layers(self.config)

    @torch.no_grad()
    def _start_weights(self) -> None:
        """Matrices as MM-Rec's start; what a library's layer starts in its own way (decays, convolutions, norms) is left so."""
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear):
                last = f"{name}.weight".endswith(_LAST_OF_BRANCH)
                scale = math.sqrt(2 * self.config.num_layers) if last else 1
                nn.init.normal_(module.weight, std=self.config.initializer_range / scale)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (B, T, vocab_size) of token ids (B, T)."""
        logits: Tensor = self.head(self._hidden(input_ids))
        return logits

    def hidden_states(self, input_ids: Tensor) -> tuple[Tensor, None]:
        """What the head would read, (B, T, D), as MMRecModel's; there is no state to hand on."""
        return self._hidden(input_ids), None

    def loss(self, batch: dict[str, Tensor], diagnostics: bool = False) -> LossOutput:
        """The training loss, as MMRecModel's; the auxiliary part is 0, and there are no diagnostics.

        Raises:
            ValueError: for a batch with `reset`: these layers do not know documents.
        """
        if "reset" in batch:
            raise ValueError("baselines read across documents; set data.init_args.reset_at_documents=false")
        hidden = self._hidden(batch["input_ids"]).flatten(0, 1)
        main, count = linear_cross_entropy(hidden, self.head.weight, batch["labels"].flatten(), self.config.loss_chunk_size)
        zero = torch.zeros((), device=main.device)
        return LossOutput(main, main, zero, zero.expand(self.config.num_layers), count, {})

    def _hidden(self, input_ids: Tensor) -> Tensor:
        x = embed(self.embedding, input_ids, self.config.embedding_scale)
        for block in self.blocks:
            x = block(x)
        normed: Tensor = self.norm(x)
        return normed

    def num_parameters(self) -> int:
        """How many weights there are."""
        return sum(parameter.numel() for parameter in self.parameters())

    def no_weight_decay_parameters(self) -> set[str]:
        """Names of norms, biases, gates' time constants and convolutions."""
        return {name for name, p in self.named_parameters() if p.ndim != 2 or getattr(p, "_no_weight_decay", False)}

    def flops_per_token(self, seq_len: int) -> int:
        """6 a weight of a matrix product, and causal attention's 6·L·D·T; the linear ones' own operators are left out."""
        config = self.config
        weights = sum(p.numel() for p in self.parameters() if p.ndim == 2)
        attention = 6 * config.num_layers * config.model_dim * seq_len if config.kind == "transformer++" else 0
        return 6 * weights + attention

    def diagnose(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Nothing: there is no auxiliary loss."""
        return {}
