"""When and where the callbacks log: at the number of optimiser steps taken before the step that is measured."""

from collections.abc import Mapping

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter


def is_log_step(trainer: Trainer, step: int) -> bool:
    """Whether `step` (optimiser steps before it) is logged: every `trainer.log_every_n_steps`, the first and the last included."""
    interval = trainer.log_every_n_steps
    return bool(interval) and (step % interval == 0 or step + 1 == trainer.max_steps)


def log_scalars(trainer: Trainer, values: Mapping[str, float], step: int) -> None:
    """Write `values` to every logger of rank 0, without the `epoch` that Lightning's own connector adds."""
    if not values or not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=step)
        logger.save()


def summary_writers(trainer: Trainer) -> list[SummaryWriter]:
    """TensorBoard's writers, for texts, histograms and layouts; none on the other ranks."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
