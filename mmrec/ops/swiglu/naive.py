"""The truth of `swiglu`, differentiated by autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_naive(gate_up: Tensor) -> Tensor:
    """See the public function."""
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = gate_up.to(wide).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)
