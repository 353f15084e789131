"""The training module: loss, optimiser, schedule, validation; no data and no paths."""

from lightning_modules.baseline_module import BaselineLightningModule
from lightning_modules.mm_rec_module import MMRecLightningModule

__all__ = ["BaselineLightningModule", "MMRecLightningModule"]
