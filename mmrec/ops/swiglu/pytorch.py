"""The gradient of `swiglu` in PyTorch: a CPU's form, and float64's."""

import torch
from torch import Tensor


def swiglu_gradient(dy: Tensor, gate_up: Tensor) -> Tensor:
    """`dgate_up`, (B, T, 2F), in fp32 or wider."""
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = gate_up.to(wide).chunk(2, dim=-1)
    gradient, sigmoid = dy.to(wide), torch.sigmoid(gate)
    return torch.cat([gradient * up * sigmoid * (1 + gate * (1 - sigmoid)), gradient * gate * sigmoid], dim=-1)
