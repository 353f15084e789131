"""RunCheckpoint: one folder of checkpoints a run, `last.ckpt` in it, at every restart the same."""

import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from mmrec.files import link_or_copy, remove_leftovers, require_writable

LAST = "last.ckpt"
COPY_NAME = re.compile(r"step=\d+-loss=.*\.ckpt")


class RunCheckpoint(ModelCheckpoint):
    """Writes `last.ckpt` every `every_n_steps` optimiser steps and at the end of `fit`, and keeps copies named by step and loss.

    A ModelCheckpoint, so that `--ckpt_path last` finds it. Not its own saving: that writes `last` a second time beside each copy, counts
    versions up (`last-v1.ckpt`) where a file is in the way, and replaces a link in two steps, between which a kill leaves none. Here the
    copy is written once, by the strategy's checkpoint IO (AtomicCheckpointIO), and `last.ckpt` becomes a hard link to it in one step.

    The newest `keep` copies stay (by time of writing, so that a run begun anew in an old folder keeps its own). The `loss` in a name is
    the training loss of the step before the checkpoint, averaged over its micro-batches and the ranks, or of the latest one that was not
    skipped (the module's `last_taken_loss`). A checkpoint with a loss or a weight that is not finite is refused: it would replace one
    that is good.
    """

    def __init__(self, dirpath: str | os.PathLike[str] | None = None, every_n_steps: int = 1000, keep: int = 2) -> None:
        """Save into `dirpath`.

        Args:
            dirpath: the folder. None: `checkpoints` under trainer.default_root_dir.
            every_n_steps: optimiser steps between checkpoints.
            keep: how many copies named by step and loss stay beside `last.ckpt`; 0 keeps none.
        """
        if every_n_steps < 1:
            raise ValueError(f"checkpoint_every is {every_n_steps}; give at least 1 step")
        if keep < 0:
            raise ValueError(f"RunCheckpoint: keep is {keep}; give 0 or more copies")
        super().__init__(
            dirpath=dirpath, every_n_train_steps=every_n_steps, save_last=True, save_on_train_epoch_end=False, enable_version_counter=False
        )
        self.keep = keep

    @property
    def state_key(self) -> str:
        """One name whatever the settings, so that a run may change them when it resumes."""
        return type(self).__name__

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Fix the folder; before a fit, refuse one that cannot be written and clear what a killed run left half-written."""
        folder = self.dirpath if self.dirpath is not None else os.path.join(trainer.default_root_dir, "checkpoints")
        self.dirpath = os.path.abspath(trainer.strategy.broadcast(folder))
        self._fs = get_filesystem(self.dirpath)
        if stage == "fit" and trainer.is_global_zero and not trainer.fast_dev_run:
            require_writable(self.dirpath, "checkpoint folder")
            remove_leftovers(Path(self.dirpath))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the step a run was resumed from as saved."""
        super().on_train_start(trainer, pl_module)
        if trainer.ckpt_path is not None:
            self._last_global_step_saved = trainer.global_step

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say where a resumed run stands; here, since a run that was already at its end starts no training."""
        if trainer.state.fn == "fit" and trainer.is_global_zero:
            print(f"resumed from step {checkpoint['global_step']}: {trainer.ckpt_path}", flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last step's checkpoint."""
        if not trainer.fast_dev_run:
            self.save_step(trainer, pl_module)

    def save_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write this step's checkpoint, unless it is there; all ranks call it."""
        if self._last_global_step_saved != trainer.global_step:
            self._save(trainer, pl_module)

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """Called by ModelCheckpoint when a checkpoint is due."""
        self._save(trainer, trainer.lightning_module)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """Called by ModelCheckpoint after the above, which has written `last.ckpt` already."""

    def _save(self, trainer: Trainer, pl_module: Any) -> None:
        loss = self._mean_loss(trainer, pl_module)
        folder = Path(str(self.dirpath))
        last = folder / LAST
        copy = folder / f"step={trainer.global_step:06d}-loss={loss:.3f}.ckpt" if self.keep else last
        # Set before saving: they are part of the state that is saved.
        self.last_model_path, self.best_model_path = str(last), str(copy)
        self._save_checkpoint(trainer, str(copy))
        if copy != last and trainer.is_global_zero:
            link_or_copy(copy, last)
            for old in self._copies()[self.keep :]:
                old.unlink(missing_ok=True)
        trainer.strategy.barrier("RunCheckpoint")

    def _copies(self) -> list[Path]:
        """Copies in the folder, the newest first."""
        found = [path for path in Path(str(self.dirpath)).glob("*") if COPY_NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)

    def _mean_loss(self, trainer: Trainer, pl_module: Any) -> float:
        loss = getattr(pl_module, "last_taken_loss", None)
        weights = [parameter.detach() for parameter in pl_module.parameters()]
        largest = torch.stack([norm.float() for norm in torch._foreach_norm(weights, float("inf"))]).amax()
        values = torch.stack([torch.zeros_like(largest) if loss is None else loss.float(), largest])
        mean = trainer.strategy.reduce(values, reduce_op="mean").tolist()
        for name, value in zip(("loss", "largest weight"), mean, strict=True):
            if not math.isfinite(value):
                raise ValueError(
                    f"the {name} is {value} at step {trainer.global_step}: nothing was written over the last good checkpoint; "
                    "resume from it with a lower model.learning_rate"
                )
        return mean[0]

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the folder tells what is there, and a moved run must not look for old paths."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to take up."""
