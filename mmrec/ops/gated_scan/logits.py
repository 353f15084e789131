"""What `gated_scan_from_logits` is given, in its operators' order: five functions pass it on."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmrec.ops.common import state_dtype


class Inputs(NamedTuple):
    """Of the public function, by its names; `low` and `high` bound the log-decays."""

    z: Tensor
    p: Tensor
    logits: Tensor
    bias: Tensor
    context: Tensor | None
    context_bias: Tensor | None
    w_g: Tensor
    h0: Tensor | None
    reset: Tensor | None
    low: float
    high: float

    def gates(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """What the decays are made of."""
        return self.logits, self.bias, self.context, self.context_bias

    def state_dtype(self) -> torch.dtype:
        """Of the states."""
        return state_dtype(self.z, self.p, *self.gates(), self.w_g, self.h0)
