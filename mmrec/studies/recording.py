"""What a run of a study keeps in memory: every step's loss, and whatever the callbacks log."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor

Points = list[tuple[int, float]]


class MemoryLogger(Logger):
    """Scalars by tag, as (step, value), in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.scalars: dict[str, Points] = {}

    @property
    def name(self) -> str:
        """Nothing is written under it."""
        return "memory"

    @property
    def version(self) -> str:
        """There is one."""
        return "0"

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append each value to its tag's points."""
        for tag, value in metrics.items():
            self.scalars.setdefault(tag, []).append((int(step or 0), float(value)))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The row of the run holds them."""

    def last(self, tag: str) -> float | None:
        """The latest value of a tag, None where there is none."""
        points = self.scalars.get(tag)
        return points[-1][1] if points else None

    def mean_of_layers(self, quantity: str, first: int = 0) -> float | None:
        """Mean over layers, from `first` on, of the latest `aux/layer_NN/<quantity>`."""
        tags = {tag: tag.removeprefix("aux/layer_").removesuffix(f"/{quantity}") for tag in self.scalars}
        found = [self.scalars[tag][-1][1] for tag, layer in tags.items() if layer.isdecimal() and int(layer) >= first]
        return sum(found) / len(found) if found else None


class MainLosses(Callback):
    """The main loss of every micro-batch, without waiting for the device until it is asked for."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the micro-batch's loss where it is."""
        last: Any = pl_module.last_loss  # the LossOutput of the module of this project
        self._kept.append(last.main)

    def by_step(self, accumulate: int) -> list[float]:
        """Each optimiser step's main loss, the mean of its micro-batches, in nats."""
        losses = torch.stack(self._kept).float().cpu()
        whole = len(losses) // accumulate * accumulate
        return [float(value) for value in losses[:whole].view(-1, accumulate).mean(1)]


class StepPeak(Callback):
    """The most memory that tensors take in a step, in GiB: the first two steps'.

    They run without a CUDA graph, whose own memory would not be seen later, and the second has the optimiser's moments. Put it behind
    callbacks that compute something of their own before a step: that is not the step's.

    Attributes:
        gib: None before the second step has ended, and on a CPU.
    """

    gib: float | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Forget what was before the first step."""
        if trainer.global_step == 0 and pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Read it once."""
        if self.gib is None and trainer.global_step == 2 and pl_module.device.type == "cuda":
            self.gib = torch.cuda.max_memory_allocated(pl_module.device) / 2**30
