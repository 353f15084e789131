"""SkippedSteps: counts the steps that were skipped for a loss or gradient that is not finite, and ends a run that skips on and on."""

import math
from typing import Any

from lightning.pytorch import Trainer
from torch import nn

from callbacks.batch_text import save_batches
from callbacks.late_steps import LateSteps, StepRecord
from callbacks.scalars import is_log_step, log_scalars
from callbacks.shards import is_finite


class SkippedSteps(LateSteps):
    """Logs `train/skipped_steps`, how many of the run so far, at every logged step, and says of each which it was.

    The module skips them by itself, on all ranks at once (`lightning_modules.skipping`); here they are read two steps later, so that
    nothing waits, and a run ends at most two steps after the last that it may skip. Batches go to `batches/` in the run's folder, on every
    rank: which of them spoiled the gradient is not known once it is reduced.
    """

    def __init__(self, max_in_row: int = 10) -> None:
        """Count.

        Args:
            max_in_row: skipped steps one after the other that end the run. Ten: bad records come one by one or, sorted, in a few batches;
                a network that is broken skips all. A run loses seconds to minutes until then, and no weight has changed.

        Raises:
            ValueError: `max_in_row` is below 1.
        """
        if max_in_row < 1:
            raise ValueError(f"skipped_steps.max_in_row is {max_in_row}; give at least 1 step")
        super().__init__()
        self.max_in_row = max_in_row
        self.skipped = self.in_row = 0

    def step_done(self, trainer: Trainer, pl_module: Any, record: StepRecord) -> None:
        """Count the step where it was skipped.

        Raises:
            ValueError: on all ranks, when `max_in_row` were skipped one after the other; one line with the diagnosis.
        """
        if math.isfinite(record.gradient_norm):
            self.in_row = 0
        else:
            self.skipped, self.in_row = self.skipped + 1, self.in_row + 1
            where = save_batches(trainer, record.step, record.batches)
            print(
                f"step {record.step} skipped, rank {trainer.global_rank}: loss {record.loss:g}, gradient norm {record.gradient_norm:g}; "
                f"{where}",
                flush=True,
            )
        if is_log_step(trainer, record.step):
            log_scalars(trainer, {"train/skipped_steps": self.skipped}, record.step)
        if self.in_row >= self.max_in_row:
            raise ValueError(
                f"{self.in_row} steps in a row were skipped, up to step {record.step} (loss {record.loss:g}, gradient norm "
                f"{record.gradient_norm:g}): {diagnosis(pl_module)}"
            )

    def state_dict(self) -> dict[str, int]:
        """The count of the run, and of the latest row."""
        return {"skipped": self.skipped, "in_row": self.in_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Count on."""
        self.skipped, self.in_row = state_dict["skipped"], state_dict.get("in_row", 0)


def diagnosis(module: nn.Module) -> str:
    """Which weights and gradients are not finite, and what to do; waits for the device.

    Of the gradients the one nearest to the loss is named: the backward pass came to it first.
    """
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    weights = [name for name, parameter in named if not is_finite(parameter)]
    gradients = [name for name, parameter in named if parameter.grad is not None and not is_finite(parameter.grad)]
    if weights:
        fault = f"{len(weights)} of {len(named)} weights are not finite, the first {weights[0]}"
        return f"{fault}; resume from the last checkpoint with a lower model.learning_rate"
    if not gradients:
        fault = "all weights are finite, and the latest gradients too"
    elif len(gradients) == len(named):
        fault = "all weights are finite, no gradient is, so that the loss itself is not"
    else:
        fault = f"all weights are finite; {len(gradients)} of {len(named)} gradients are not, the first on the way back {gradients[-1]}"
    return f"{fault}; look at the batches in batches/, then resume with --ckpt_path last and a lower model.learning_rate or other data"
