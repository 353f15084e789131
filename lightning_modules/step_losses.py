"""StepLosses: what a step's loss was made of."""

from typing import NamedTuple

from torch import Tensor


class StepLosses(NamedTuple):
    """Losses of one optimiser step, averaged over its micro-batches and all ranks.

    Attributes:
        step: optimiser steps taken before this one.
        loss, main, auxiliary: 0-dim fp32; `auxiliary` is scaled by λ_P, `loss` is the sum of the two.
        auxiliary_by_layer: (L,) fp32, unscaled; (0,) without UBÖO.
    """

    step: int
    loss: Tensor
    main: Tensor
    auxiliary: Tensor
    auxiliary_by_layer: Tensor
