"""Data modules: text in C4's form from the hub, local shards, prepared tokens or the built-in sample, and two synthetic recall tasks."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.c4 import C4DataModule
    from datamodules.recall import RecallDataModule

__all__ = ["C4DataModule", "RecallDataModule"]


def __getattr__(name: str) -> Any:
    """Import both when one is asked for: data workers need the package, but not Lightning, which takes seconds to import."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from datamodules import c4, recall

    globals().update(C4DataModule=c4.C4DataModule, RecallDataModule=recall.RecallDataModule)
    return globals()[name]
