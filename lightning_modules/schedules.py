"""Schedules over optimiser steps."""

import math
from collections.abc import Callable


def warmup_cosine(warmup_steps: int, decay_steps: int, min_ratio: float) -> Callable[[int], float]:
    """The factor of the peak learning rate: linear to 1 over `warmup_steps`, then a half cosine to `min_ratio` at `decay_steps`.

    Step 0 already learns (factor 1/warmup_steps); from `decay_steps` on the factor stays at `min_ratio`. The cosine is that of
    Loshchilov & Hutter, arXiv:1608.03983, without restarts.

    Args:
        warmup_steps: optimiser steps of the linear part; 0 starts at the peak.
        decay_steps: optimiser step, counted from the first, at which the minimum is reached.
        min_ratio: the minimum as a share of the peak, in [0, 1].

    Returns:
        A function of the number of optimiser steps already taken. It is a plain function on purpose: `LambdaLR` then keeps it out of
        the checkpoint, and a resumed run follows its own configuration.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, decay_steps - warmup_steps))
        return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def linear_change(start: float, end: float, steps: int, step: int) -> float:
    """The value after `step` of `steps` equal steps from `start` to `end`; `end` from then on, and where `steps` is 0."""
    return end if step >= steps else start + (end - start) * step / steps
