"""LossSpikes: finds the steps whose loss jumps, and keeps the text that they were about."""

import math
from collections import deque
from typing import Any

import torch
from lightning.pytorch import Trainer

from callbacks.batch_text import save_batches
from callbacks.late_steps import LateSteps, StepRecord
from callbacks.scalars import is_log_step, log_scalars

LEAST = 20  # losses that a mean and a deviation are taken of


class LossSpikes(LateSteps):
    """Says of a step that its loss is a spike: more than `sigmas` standard deviations above the mean of the latest `window` steps.

    Rule and numbers are those of OLMo-core's SkipStepOptimizer (6 of 128, from half a window on, at least 20 steps), upwards only; the
    step is taken all the same. Each rank judges the loss of its own batches, in which a bad document shows more than in the mean of all,
    and prints a line with step, loss, what was expected, and the file with the batch's text and place (`batches/` in the run's folder).
    Every step is looked at, two steps after it, so that nothing waits for the device.

    Logged: `train/spike` at every logged step, the number of spikes on all ranks since the one before.
    """

    def __init__(self, window: int = 128, sigmas: float = 6.0) -> None:
        """Watch.

        Args:
            window: steps that the mean and the standard deviation are of.
            sigmas: standard deviations above the mean at which a spike begins.

        Raises:
            ValueError: `window` is below 20 steps, or `sigmas` is no finite number above 0.
        """
        if window < LEAST:
            raise ValueError(f"loss_spikes.window is {window}; give at least {LEAST} steps")
        if not 0 < sigmas < math.inf:
            raise ValueError(f"loss_spikes.sigmas is {sigmas}; give a finite number above 0")
        super().__init__()
        self.sigmas = sigmas
        self._losses: deque[float] = deque(maxlen=window)
        self._unlogged = 0

    def step_done(self, trainer: Trainer, pl_module: Any, record: StepRecord) -> None:
        """Compare the step's loss with those before; a loss that is not finite is SkippedSteps' affair."""
        if math.isfinite(record.loss):
            self._judge(trainer, record)
            self._losses.append(record.loss)
        if is_log_step(trainer, record.step):
            count = torch.tensor(self._unlogged, device=pl_module.device)
            if trainer.world_size > 1:
                count = trainer.strategy.reduce(count, reduce_op="sum")
            log_scalars(trainer, {"train/spike": float(count)}, record.step)
            self._unlogged = 0

    def _judge(self, trainer: Trainer, record: StepRecord) -> None:
        if len(self._losses) < max(LEAST, (self._losses.maxlen or 0) // 2):
            return
        deviation, mean = (float(value) for value in torch.std_mean(torch.tensor(self._losses, dtype=torch.float64)))
        if record.loss <= mean + self.sigmas * deviation or deviation == 0:
            return
        self._unlogged += 1
        where = save_batches(trainer, record.step, record.batches)
        print(
            f"loss spike at step {record.step}, rank {trainer.global_rank}: loss {record.loss:.4f}, expected {mean:.4f} ± {deviation:.4f}; "
            f"{where}",
            flush=True,
        )

    def state_dict(self) -> dict[str, list[float]]:
        """Rank 0's latest losses, which a resumed run expects on all ranks."""
        return {"losses": list(self._losses)}

    def load_state_dict(self, state_dict: dict[str, list[float]]) -> None:
        """Go on from them."""
        self._losses.extend(state_dict["losses"])
