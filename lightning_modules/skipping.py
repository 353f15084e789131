"""A step whose loss or gradient is not finite is not taken: weights, moments and the optimiser's count of steps stay as they were.

One number decides, the norm of the gradients after they were reduced, which is the same on every rank: a NaN or an infinity of one rank is
in it, one of any micro-batch of the step, and that of a loss too, since `spoiled_unless_finite` hands it on to the gradients. No rank has
to be asked, and with a fused optimiser the host does not wait. The learning rate's schedule and the count of steps go on, as in OLMo-core's
SkipStepOptimizer: both follow the data that was read.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer


def spoiled_unless_finite(loss: Tensor) -> Tensor:
    """`loss`, 0-dim, with gradients that are NaN where it is not finite: an infinite cross-entropy may have finite ones."""
    return loss * (loss.detach() * 0 + 1)  # 1 for a finite number, else NaN


def divides_gradients(optimizer: Optimizer) -> bool:
    """Whether `step` divides all gradients by the optimiser's `grad_scale`, and does nothing where its `found_inf` is 1."""
    fused = isinstance(optimizer, Adam) and all(group.get("fused") for group in optimizer.param_groups)
    own = getattr(optimizer, "divides_gradients", None)
    return fused or (own is not None and own())


def skip_unless_finite(optimizer: Any, parameters: list[nn.Parameter], norm: Tensor) -> bool:
    """Make the coming `step` one that changes nothing where `norm` is not finite.

    A fused optimiser reads the answer on the device. Any other is asked for on the host, which waits for a GPU there, and finds no
    gradients: it passes such parameters over. `give_gradients_back` undoes that.

    Args:
        optimizer: the optimiser itself, not Lightning's wrapper.
        parameters: those of it that have gradients.
        norm: of all gradients of all ranks, 0-dim.

    Returns:
        Whether it is known already that the step is skipped.
    """
    if divides_gradients(optimizer):
        optimizer.found_inf = norm.isfinite().logical_not().float()
        return False
    if bool(norm.isfinite()):
        return False
    optimizer.withheld_gradients = [(parameter, parameter.grad) for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return True


def give_gradients_back(optimizer: Any) -> None:
    """Undo `skip_unless_finite` after the step, so that the gradients can be looked at."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # out of Lightning's wrapper
    for parameter, gradient in getattr(optimizer, "withheld_gradients", ()):
        parameter.grad = gradient
    optimizer.withheld_gradients = []


def loss_of_step_taken(loss: Tensor, norm: Tensor | None, before: Tensor | None) -> Tensor:
    """`loss` of a step whose gradients have this norm, 0-dim; of a skipped one that of the step `before` it, or 0 where none was taken."""
    if norm is None:
        return loss
    return torch.where(norm.isfinite(), loss, torch.zeros_like(loss) if before is None else before)
