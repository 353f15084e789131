"""Data modules: text in C4's form from the hub, local shards, prepared tokens or the built-in sample, and two synthetic recall tasks."""

from datamodules.c4 import C4DataModule
from datamodules.recall import RecallDataModule

__all__ = ["C4DataModule", "RecallDataModule"]
