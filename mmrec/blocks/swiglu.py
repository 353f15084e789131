"""The feed-forward half of a block."""

from typing import Any

import torch
from torch import Tensor, nn

from mmrec.blocks.linear import add_linear, add_product, apply_linear, is_plain
from mmrec.ops import swiglu
from mmrec.ops.registration import refuse_second_order
from mmrec.ops.wide_product import wide_product


class SwiGLU(nn.Module):
    """`W_down(SiLU(W_gate x) ⊙ W_up x)` (Shazeer 2020, arXiv:2002.05202), gate and up in one product, no biases.

    Args:
        model_dim: D.
        ffn_dim: F.
        recompute: the backward forms the gated activations again, one pass over memory, instead of keeping F numbers a token.
    """

    def __init__(self, model_dim: int, ffn_dim: int, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.W_gate_up = nn.Linear(model_dim, 2 * ffn_dim, bias=False)
        self.W_down = nn.Linear(ffn_dim, model_dim, bias=False)

    def forward(self, x: Tensor, stream: Tensor, owned: bool = False) -> Tensor:
        """(B, T, D) to (B, T, D), added to the residual `stream`, in place where it is `owned`."""
        gate_up = apply_linear(x, self.W_gate_up)
        if self.recompute and is_plain(self.W_down):
            out: Tensor = _GatedDown.apply(stream, gate_up, self.W_down.weight, owned)
            return out
        return add_linear(stream, swiglu(gate_up), self.W_down, owned)


class _GatedDown(torch.autograd.Function):
    """`stream + W swiglu(gate_up)` that keeps `gate_up` alone."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, gate_up: Tensor, weight: Tensor, owned: bool) -> Tensor:
        narrow = weight.to(gate_up.dtype)
        ctx.save_for_backward(gate_up, narrow)
        ctx.weight_dtype = weight.dtype
        if owned:
            ctx.mark_dirty(stream)
        return add_product(stream, swiglu(gate_up), narrow, owned)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order("a feed-forward that recomputes", "set activation_checkpointing to false")
        gate_up, weight = ctx.saved_tensors
        flat = dy.flatten(0, 1).to(weight.dtype)
        weight_wanted = ctx.needs_input_grad[2]
        dweight = wide_product(flat.t(), swiglu(gate_up).flatten(0, 1), ctx.weight_dtype) if weight_wanted else None
        dgated = torch.mm(flat, weight).view(*dy.shape[:2], -1)
        return dy, torch.ops.mmrec.swiglu_bwd(dgated, gate_up), dweight, None
