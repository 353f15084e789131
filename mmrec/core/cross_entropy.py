"""The language-modelling loss without the logits of a whole batch."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED_LABEL = -1


def _chunk_loss(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    logits = F.linear(hidden_ND, weight_VD)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, labels_N, ignore_index=IGNORED_LABEL, reduction="sum")


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `softmax(hidden · weightᵀ)`, `chunk_size` tokens' logits at a time, recomputed in the backward.

    Args:
        hidden_ND: (N, D), the last hidden states.
        weight_VD: (V, D), the output head.
        labels_N: (N,) int64; −1 where nothing is to be learned.
        chunk_size: tokens whose (chunk, V) logits may exist at once.

    Returns:
        The mean loss over labels other than −1 (0-dim fp32; 0 where there is none), and how many there are (0-dim int64).
    """
    total = torch.zeros((), dtype=torch.promote_types(hidden_ND.dtype, torch.float32), device=hidden_ND.device)
    chunks = list(zip(hidden_ND.split(chunk_size), labels_N.split(chunk_size), strict=True))
    for hidden, labels in chunks:
        # A single chunk is kept: to compute it twice would save nothing.
        alone = len(chunks) == 1
        total = total + (
            _chunk_loss(hidden, weight_VD, labels) if alone else checkpoint(_chunk_loss, hidden, weight_VD, labels, use_reentrant=False)
        )
    count = (labels_N != IGNORED_LABEL).sum()
    return total / count.clamp(min=1), count
