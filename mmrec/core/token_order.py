"""UBÖO above the blocks, "order": which tokens come next, and in which order (token order prediction, arXiv:2508.19228).

A head of its own gives a distribution over the vocabulary, compared by cross-entropy with `p_v ∝ exp(W − d_v)`, where `d_v` = 1 … W is how
far ahead token `v` occurs first; one that does not occur within the W next ones has 0.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrec.config import MMRecConfig
from mmrec.core.chunks import sum_over_chunks
from mmrec.core.cross_entropy import IGNORED_LABEL
from mmrec.core.initialization import draw_apart, empty_linear
from mmrec.core.uboo import PlanningLoss

WINDOW = 16  # tokens looked ahead, W; the sixteenth weighs exp(−15) of the first


class TokenOrder(nn.Module):
    """The second head, which only training needs, and its loss."""

    def __init__(self, config: MMRecConfig) -> None:
        super().__init__()
        self.chunk_size = config.loss_chunk_size
        self.W_order = empty_linear(config.model_dim, config.vocab_size, bias=False)
        draw_apart(self.W_order.weight, config.initializer_range)

    def forward(self, hidden_BTD: Tensor, labels_BT: Tensor, reset_BT: Tensor | None) -> PlanningLoss:
        """The cross-entropy of every token that is followed by another of its document. Its gradient reaches the head and `hidden_BTD`.

        Args:
            hidden_BTD: the last hidden states.
            labels_BT: int64, the token after each; −1 is no token.
            reset_BT: true at the first token of a document.
        """
        wide = torch.promote_types(hidden_BTD.dtype, torch.float32)
        tokens, weights = upcoming(labels_BT, reset_BT, wide)
        flat = (hidden_BTD.flatten(0, 1), tokens.flatten(0, 1), weights.flatten(0, 1))
        total = sum_over_chunks(partial(_cross_entropy, self.W_order.weight), *flat, size=self.chunk_size)
        return PlanningLoss(total, (weights > 0).any(-1).sum())


def upcoming(labels_BT: Tensor, reset_BT: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The W tokens that come next, int64 (B, T, W), and the probability that each is to have, (B, T, W) in `dtype`.

    0 has what lies in another document or beyond the sequence, and what has occurred among those before it.
    """
    follow = (0, WINDOW - 1)
    tokens = F.pad(labels_BT, follow, value=IGNORED_LABEL).unfold(1, WINDOW, 1)
    counted = tokens != IGNORED_LABEL
    if reset_BT is not None:
        document_BT = reset_BT.cumsum(1)
        # Of the token that a label is; the last one's is not known, and taken to go on.
        of_label_BT = torch.cat([document_BT[:, 1:], document_BT[:, -1:]], dim=1)
        counted = counted & (F.pad(of_label_BT, follow).unfold(1, WINDOW, 1) == document_BT.unsqueeze(-1))
    place = torch.arange(WINDOW, device=labels_BT.device)
    earlier = (tokens.unsqueeze(-1) == tokens.unsqueeze(-2)) & (place < place.unsqueeze(-1))  # [..., j, i]: token i is token j, and i < j
    weights = torch.where(counted & ~earlier.any(-1), torch.exp(-place.to(dtype)), 0)
    share = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    return tokens.clamp(min=0), share


def _cross_entropy(weight_VD: Tensor, hidden_ND: Tensor, tokens_NW: Tensor, weights_NW: Tensor) -> Tensor:
    logits = F.linear(hidden_ND, weight_VD).to(weights_NW.dtype)
    counted_N = (weights_NW > 0).any(-1)
    expected_N = (weights_NW * logits.gather(1, tokens_NW)).sum(-1)
    return torch.where(counted_N, logits.logsumexp(-1) - expected_N, 0).sum()
