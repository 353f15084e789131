"""When and where the callbacks and the module log: at the number of optimiser steps taken before the step that is measured."""

from collections.abc import Mapping

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter


def is_due(trainer: Trainer, step: int, interval: int) -> bool:
    """Whether what is done every `interval` steps is done at `step` (optimiser steps before it); 0: never.

    The first step is one of them, and the last: TensorBoard draws a curve of one point badly, or, off its default axis, not at all.
    """
    return interval > 0 and (step % interval == 0 or step + 1 == trainer.max_steps)


def is_log_step(trainer: Trainer, step: int) -> bool:
    """Whether `step` is logged: every `trainer.log_every_n_steps`, the first and the last included."""
    return is_due(trainer, step, trainer.log_every_n_steps)


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
