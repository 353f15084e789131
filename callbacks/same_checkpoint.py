"""SameCheckpoint: all ranks go on from one checkpoint, or none does."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from mmrec.files import read_checkpoint
from mmrec.ranks import gathered


class SameCheckpoint(Callback):
    """Compares, before anything is loaded, which checkpoint each rank has found: its name, its size and its step.

    Each process looks for itself before there are others to ask, and all look at the same files by the same rule. Where what they see
    differs (folders that are not shared, a disk that fails on one node), they would train from different weights without a word.
    """

    def __init__(self, path: Path | None) -> None:
        """Remember what this rank has found.

        Args:
            path: the checkpoint; None: there is none. `trainer.ckpt_path` is set only later than `setup`, as the checkpoint is read.
        """
        self.path = path

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare, on all ranks.

        Raises:
            ValueError: on all ranks, naming what two of them have found.
        """
        if trainer.world_size == 1:
            return
        found = gathered(_described(self.path))
        other = next((rank for rank, description in enumerate(found) if description != found[0]), None)
        if other is not None:
            raise ValueError(
                f"the ranks have found different checkpoints: rank 0 {found[0]}, rank {other} {found[other]}; "
                "they must see one run folder: let trainer.default_root_dir lie on a disk that all nodes share"
            )


def _described(path: Path | None) -> str:
    if path is None:
        return "none"
    try:
        return f"{path.name} of {path.stat().st_size:,} bytes at step {read_checkpoint(path, mmap=True).get('global_step')}"
    except (OSError, ValueError) as error:  # said by all ranks: the others wait for this one's answer
        return f"{path.name}, unreadable ({error})"
