"""The feed-forward half of a block."""

from torch import Tensor, nn

from mmrec.blocks.residual import add_linear
from mmrec.ops import swiglu


class SwiGLU(nn.Module):
    """`W_down(SiLU(W_gate x) ⊙ W_up x)` (Shazeer 2020, arXiv:2002.05202), gate and up in one product, no biases."""

    def __init__(self, model_dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.W_gate_up = nn.Linear(model_dim, 2 * ffn_dim, bias=False)
        self.W_down = nn.Linear(ffn_dim, model_dim, bias=False)

    def forward(self, x: Tensor, stream: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D), added to the residual `stream`."""
        return add_linear(stream, swiglu(self.W_gate_up(x)), self.W_down)
