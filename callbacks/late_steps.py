"""LateSteps: looks at every optimiser step, but a little later, so that the host does not wait for the device."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from mmrec.measuring.late_values import LateValues

# Steps that may lie on the device before the host reads what the oldest gave. The same on every rank, so that all decide the same at the
# same step without asking each other; when two more are queued the oldest is long done.
LAG = 2


@dataclass(frozen=True)
class GivenBatch:
    """A micro-batch: its tokens (B, T) where they lie, and which batch of the loader it was, from 0; None where that does not count."""

    input_ids: Tensor
    number: int | None


@dataclass
class StepRecord:
    """An optimiser step as this rank saw it.

    Attributes:
        step: steps before it.
        loss: mean of this rank's micro-batches.
        gradient_norm: of all ranks, before clipping; 0 where nothing had a gradient.
        batches: this rank's micro-batches.
    """

    step: int
    loss: float = 0.0
    gradient_norm: float = 0.0
    batches: list[GivenBatch] = field(default_factory=list)


class LateSteps(Callback):
    """Calls `step_done` for every optimiser step, LAG steps after it; for the last ones at the end of training, or before a checkpoint.

    So a checkpoint's state of the callback is that after all steps before it. The module must have `last_step_loss` and
    `last_gradient_norm`, 0-dim tensors on its device.
    """

    def __init__(self) -> None:
        self._step = 0
        self._batches: list[GivenBatch] = []
        self._waiting: deque[tuple[StepRecord, LateValues]] = deque()

    def step_done(self, trainer: Trainer, pl_module: Any, record: StepRecord) -> None:
        """What is to be done about a step; every rank is here at the same time."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin where the run does."""
        self._step = trainer.global_step
        self._batches, self._waiting = [], deque()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the step's numbers, and read those of an earlier one."""
        given = getattr(trainer.train_dataloader, "batches_given", None)
        self._batches.append(GivenBatch(batch["input_ids"], None if given is None else given - 1))
        if trainer.global_step == self._step:  # between two micro-batches
            return
        record = StepRecord(self._step, batches=self._batches)
        self._step, self._batches = trainer.global_step, []
        loss, norm = pl_module.last_step_loss.float(), pl_module.last_gradient_norm
        self._waiting.append((record, LateValues(torch.stack([loss, torch.zeros_like(loss) if norm is None else norm.float()]))))
        while len(self._waiting) > LAG:
            self._finish(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read what is left, and put the state after it in the place of the one before."""
        self._finish_all(trainer, pl_module)
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read what is left."""
        self._finish_all(trainer, pl_module)

    def _finish_all(self, trainer: Trainer, pl_module: Any) -> None:
        while self._waiting:
            self._finish(trainer, pl_module)

    def _finish(self, trainer: Trainer, pl_module: Any) -> None:
        record, values = self._waiting.popleft()
        record.loss, record.gradient_norm = values.read()
        self.step_done(trainer, pl_module, record)
