"""RunCheckpoint: one folder of checkpoints a run, `last.ckpt` in it, at every restart the same."""

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from callbacks.shards import largest
from callbacks.telling import tell
from mmrec.checkpoint_files import BEST, DAMAGED_SUFFIX, LAST, best_copies, best_name, copies, copy_name
from mmrec.files import link_or_copy, remove_leftovers, require_writable

FAILURES_IN_A_ROW = 3  # writes that may fail one after the other before the run stops
VALIDATION_LOSS = "val/loss"


class RunCheckpoint(ModelCheckpoint):
    """Writes `last.ckpt` every `every_n_steps` optimiser steps and at the end of `fit`, and keeps copies named by step and loss.

    A ModelCheckpoint, so that `--ckpt_path last` finds it. Not its own saving: that writes `last` a second time beside each copy, counts
    versions up (`last-v1.ckpt`) where a file is in the way, and replaces a link in two steps, between which a kill leaves none. Here the
    copy is written once, by the strategy's checkpoint IO (AtomicCheckpointIO, or BackgroundCheckpointIO), and once it is there `last.ckpt`
    becomes a hard link to it in one step.

    The newest `keep` copies stay (by time of writing, so that a run begun anew in an old folder keeps its own). The `loss` in a name is
    the training loss of the step before the checkpoint, averaged over its micro-batches and the ranks, or of the latest one that was not
    skipped (the module's `last_taken_loss`). A checkpoint with a loss or a weight that is not finite is refused: it would replace one
    that is good.

    With `keep_best` a validation that gives the lowest `val/loss` so far (in the module's `last_validation`) makes `best.ckpt` a hard link
    to the checkpoint of the step that was validated, which is written for it where it is not there already. A second link is named by
    that step and loss. Without a validation there is no `best.ckpt`.

    Gradients are in no checkpoint, so that none but `best.ckpt` is of a moment within a step. What asks the run to stop there
    (`trainer.max_time`, EarlyStopping after a validation within a step) waits until the step's other micro-batches are done.

    A write that fails (a full disk, a folder without rights) is told in one line, and training goes on: the next may well succeed. After
    three in a row, or where a run's last one fails, the run stops with that line, on all ranks. What was written before stays as it is.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        every_n_steps: int = 1000,
        keep: int = 2,
        keep_best: bool = False,
        damaged: Sequence[Path] = (),
    ) -> None:
        """Save into `dirpath`.

        Args:
            dirpath: the folder. None: `checkpoints` under trainer.default_root_dir.
            every_n_steps: optimiser steps between checkpoints.
            keep: how many copies named by step and loss stay beside `last.ckpt`; 0 keeps none. The newest of them is `last.ckpt` itself: it
                takes two for there to be one to go back to.
            keep_best: whether the checkpoint of the lowest validation loss stays as well.
            damaged: files that were found damaged, and that the run does not go on from: renamed once it trains, as otherwise they would
                be kept in the place of whole ones.
        """
        if every_n_steps < 1:
            raise ValueError(f"checkpoint_every is {every_n_steps}; give at least 1 step")
        if keep < 0:
            raise ValueError(f"RunCheckpoint: keep is {keep}; give 0 or more copies")
        super().__init__(
            dirpath=dirpath, every_n_train_steps=every_n_steps, save_last=True, save_on_train_epoch_end=False, enable_version_counter=False
        )
        self.keep, self.keep_best, self.damaged = keep, keep_best, damaged
        self._best_loss = float("inf")
        self._failures = 0  # in a row
        self._written: Path | None = None  # the checkpoint of the step that was saved last
        self._stops = False  # at the end of the step

    @property
    def state_key(self) -> str:
        """One name whatever the settings, so that a run may change them when it resumes."""
        return type(self).__name__

    @property
    def folder(self) -> Path:
        """Where the checkpoints lie; known from `setup` on."""
        return Path(str(self.dirpath))

    # ---- before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Fix the folder; before a fit, refuse one that cannot be written and clear what a killed run left half-written."""
        folder = self.dirpath if self.dirpath is not None else os.path.join(trainer.default_root_dir, "checkpoints")
        self.dirpath = os.path.abspath(trainer.strategy.broadcast(folder))
        self._fs = get_filesystem(self.dirpath)
        if stage == "fit" and trainer.is_global_zero and not trainer.fast_dev_run:
            require_writable(self.dirpath, "checkpoint folder")
            remove_leftovers(Path(self.dirpath))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the step a run was resumed from as saved, and its best validation loss; make the folder whole where it was not."""
        super().on_train_start(trainer, pl_module)
        self._failures, self._best_loss, self._stops = 0, float("inf"), False
        if trainer.ckpt_path is None:
            return
        self._last_global_step_saved = trainer.global_step
        if trainer.is_global_zero and self.keep_best:
            self._best_loss = _settle_best(self.folder)
        if trainer.is_global_zero:
            self._mend(Path(trainer.ckpt_path))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say where a resumed run stands; here, since a run that was already at its end starts no training."""
        if trainer.state.fn == "fit" and trainer.is_global_zero:
            print(f"resumed from step {checkpoint['global_step']}: {trainer.ckpt_path}", flush=True)

    def _mend(self, resumed: Path) -> None:
        """Put damaged files out of the way, and `last.ckpt` where it is gone: what comes next may be killed before its first checkpoint."""
        for path in self.damaged:
            path.rename(path.with_name(path.name + DAMAGED_SUFFIX))
        if self.damaged:
            print(f"renamed to *{DAMAGED_SUFFIX}: {', '.join(path.name for path in self.damaged)}", flush=True)
        if Path(os.path.abspath(resumed)).parent == self.folder and not (self.folder / LAST).exists():
            _link(resumed, self.folder / LAST)

    # ---- when

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write what is due at the end of a step, and let the run stop there."""
        if self._within_step(trainer):  # ModelCheckpoint would try a write that has failed once more
            return
        trainer.should_stop = trainer.should_stop or self._stops
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _within_step(self, trainer: Trainer) -> bool:
        """Whether a step's other micro-batches are still to come; then a stop that was asked for is put off."""
        within = trainer.fit_loop._should_accumulate()
        if within and trainer.should_stop:
            self._stops, trainer.should_stop = True, False
        return within

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the checkpoint of what was validated, if it is the best so far."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.fast_dev_run:
            return
        self._within_step(trainer)
        if not self.keep_best:
            return
        loss = getattr(pl_module, "last_validation", {}).get(VALIDATION_LOSS, float("nan"))
        if not trainer.strategy.broadcast(loss < self._best_loss):  # rank 0 knows what could be written
            return
        named = self.folder / best_name(trainer.global_step, loss)
        written = self._written if self._last_global_step_saved == trainer.global_step else None
        follow = partial(self._publish_best, written or named, named, loss)
        if written is None:
            # Under its own name only: `last.ckpt` is what a run goes on from, and this may be within a step, where RankChange refuses to.
            self._write(trainer, partial(trainer.save_checkpoint, str(named), self.save_weights_only), follow)
        elif trainer.is_global_zero and (failure := self._follow(trainer, follow)):
            tell(f"warning: {failure}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last step's checkpoint, and wait until it is there."""
        if trainer.fast_dev_run:
            return
        self.save_step(trainer, pl_module)
        earlier = self._earlier_failure(trainer)
        self._report(trainer, [earlier], self._failures + (earlier is not None), final=True)

    def save_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write this step's checkpoint, the run's last, unless it is there; all ranks call it."""
        if self._last_global_step_saved != trainer.global_step:
            self._save(trainer, pl_module, final=True)

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """Called by ModelCheckpoint when a checkpoint is due."""
        self._save(trainer, trainer.lightning_module)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """Called by ModelCheckpoint after the above, which has written `last.ckpt` already."""

    # ---- how

    def _save(self, trainer: Trainer, pl_module: Any, final: bool = False) -> None:
        loss = self._mean_loss(trainer, pl_module)
        last = self.folder / LAST
        copy = self.folder / copy_name(trainer.global_step, loss) if self.keep else last
        before, self._written = self._last_global_step_saved, copy
        # Set before saving: they are part of the state that is saved.
        self.last_model_path, self.best_model_path = str(last), str(copy)
        if not self._write(trainer, partial(self._save_checkpoint, trainer, str(copy)), partial(self._publish, copy, last), final):
            self._last_global_step_saved, self._written = before, None

    def _write(self, trainer: Trainer, save: Callable[[], None], follow: Callable[[], None], final: bool = False) -> bool:
        """Save, and have rank 0 do what follows once the file is there; what went wrong is told, and no error unless it is too much.

        Returns:
            Whether the file is there, or in the background on its way.
        """
        earlier, now = self._earlier_failure(trainer), None
        self._failures += earlier is not None  # before what is written next, perhaps in the background, sets it to 0
        count = self._failures
        if trainer.is_global_zero and self._last_global_step_saved and not self.folder.is_dir():
            print(f"the checkpoint folder {self.folder} was gone: it is made anew", flush=True)

        def published() -> None:
            follow()
            self._failures = 0

        try:
            save()
        except OSError as error:  # of rank 0's checkpoint IO (loggers keep theirs to themselves); the others wait at the barrier it missed
            now = str(error)
            trainer.strategy.barrier("Trainer.save_checkpoint")
        else:
            now = self._follow(trainer, published) if trainer.is_global_zero else None
        if now is not None:
            self._failures = count = count + 1
        return not self._report(trainer, [earlier, now], count, final)

    def _follow(self, trainer: Trainer, action: Callable[[], None]) -> str | None:
        """Do it once what was saved last is there: at once with a checkpoint IO that knows of no later. What was wrong, if it is known."""
        try:
            then = getattr(trainer.strategy.checkpoint_io, "then", None)
            action() if then is None else then(action)
        except OSError as error:
            return str(error)
        return None

    def _publish(self, copy: Path, last: Path) -> None:
        """What follows a checkpoint that was written: `last.ckpt`, and an end to copies that are too many."""
        if copy != last:
            _link(copy, last)
            for old in copies(self.folder)[self.keep :]:
                old.unlink(missing_ok=True)

    def _publish_best(self, source: Path, named: Path, loss: float) -> None:
        """Make `best.ckpt` and `named`, which says of which step and loss it is, what `source` is; the best before goes."""
        if not loss < self._best_loss:  # a better one was still being written when this was asked for
            if source == named:
                named.unlink(missing_ok=True)
            return
        if source != named:
            _link(source, named)
        _link(named, self.folder / BEST)
        self._best_loss = loss
        for other in best_copies(self.folder):
            if other.path != named:
                other.path.unlink(missing_ok=True)

    def _earlier_failure(self, trainer: Trainer) -> str | None:
        """What the write before came to, where it went on behind the training."""
        try:
            getattr(trainer.strategy.checkpoint_io, "wait", lambda: None)()
        except OSError as error:
            return str(error)
        return None

    def _report(self, trainer: Trainer, outcomes: Sequence[str | None], count: int, final: bool) -> bool:
        """Tell of writes that failed, and end the run on all ranks where there were too many; a collective.

        Args:
            outcomes: of writes, on rank 0: what was wrong with them, or None.
            count: of failures in a row, with these.
            final: whether nothing will be written after them.

        Returns:
            Whether the last of them failed.
        """
        failures = [failure for failure in outcomes if failure is not None]
        last_failed = outcomes[-1] is not None
        stops = (last_failed and final) or (bool(failures) and count >= FAILURES_IN_A_ROW)
        failures, stops, last_failed = trainer.strategy.broadcast((failures, stops, last_failed))
        if stops:
            raise OSError(f"{failures[-1]}. What was written before is whole: go on from it with --ckpt_path last")
        if trainer.is_global_zero:
            for failure in failures:
                tell(f"warning: {failure}. Training goes on ({count} of at most {FAILURES_IN_A_ROW} failures in a row)")
        return last_failed

    def _mean_loss(self, trainer: Trainer, pl_module: Any) -> float:
        loss = getattr(pl_module, "last_taken_loss", None)
        weight = largest(list(pl_module.parameters()))
        values = torch.stack([torch.zeros_like(weight) if loss is None else loss.float(), weight])
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


def _settle_best(folder: Path) -> float:
    """Let `best.ckpt` be the best of those that a killed run left, and the others go; its loss, infinity where there is none."""
    found = best_copies(folder)
    if not found:
        return float("inf")
    _link(found[0].path, folder / BEST)
    for other in found[1:]:
        other.path.unlink(missing_ok=True)
    return found[0].val_loss


def _link(source: Path, target: Path) -> None:
    try:
        link_or_copy(source, target)
    except OSError as error:
        raise OSError(f"cannot make {target} a link to {source.name}: {error.strerror or error}") from error
