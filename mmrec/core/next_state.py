"""UBÖO above the blocks, "decode": what the head will read from the next state, foreseen from this one and the next token.

`x̂_t = x_{t−1} + W_out gelu(W_in [x_{t−1}; e_t])` of the last hidden states `x` and the embedded token `e_t`, and
`L = mean KL(softmax(W_head sg[x_t]) ‖ softmax(sg[W_head] x̂_t))`: NextLat's decoded term (arXiv:2511.05963). States that decode alike cost
nothing, so there is nothing to be won by making them small or equal.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrec.config import MMRecConfig
from mmrec.core.chunks import sum_over_chunks
from mmrec.core.initialization import draw_apart, empty_linear
from mmrec.core.uboo import PlanningLoss


class NextState(nn.Module):
    """The predictor of the next state, which only training needs, and its loss."""

    def __init__(self, config: MMRecConfig) -> None:
        super().__init__()
        dim = config.model_dim
        self.chunk_size = config.loss_chunk_size
        self.W_in = empty_linear(2 * dim, dim, bias=False)
        self.W_out = empty_linear(dim, dim, bias=False)
        for index, linear in enumerate((self.W_in, self.W_out)):
            draw_apart(linear.weight, config.initializer_range, index)

    def forward(self, hidden_BTD: Tensor, embedded_BTD: Tensor, head_VD: Tensor, reset_BT: Tensor | None) -> PlanningLoss:
        """The divergence of every token that has a state before it in its document.

        Its gradient reaches this module's weights and `hidden_BTD` as the state before, and nothing else.

        Args:
            hidden_BTD: the last hidden states, as the head reads them.
            embedded_BTD: the tokens as they enter the first block.
            head_VD: the output head's weight.
            reset_BT: true at the first token of a document.
        """
        before, states = hidden_BTD[:, :-1], hidden_BTD[:, 1:].detach()
        inner = self.W_in(torch.cat([before, embedded_BTD[:, 1:].detach().to(before.dtype)], dim=-1))
        foreseen = before + self.W_out(F.gelu(inner))
        counted = torch.ones_like(states[..., 0], dtype=torch.bool) if reset_BT is None else ~reset_BT[:, 1:]
        head = head_VD.detach().to(hidden_BTD.dtype)  # once, and not for every chunk anew
        flat = (foreseen.flatten(0, 1), states.flatten(0, 1), counted.flatten())
        return PlanningLoss(sum_over_chunks(partial(_divergence, head), *flat, size=self.chunk_size), counted.sum())


def _divergence(head_VD: Tensor, foreseen_ND: Tensor, states_ND: Tensor, counted_N: Tensor) -> Tensor:
    wide = torch.promote_types(foreseen_ND.dtype, torch.float32)
    log_p = F.linear(states_ND, head_VD).to(wide).log_softmax(-1)
    log_q = F.linear(foreseen_ND, head_VD).to(wide).log_softmax(-1)
    divergence_N = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return torch.where(counted_N, divergence_N, 0).sum()
