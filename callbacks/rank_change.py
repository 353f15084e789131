"""RankChange: a run that goes on with other ranks or micro-batches counts its batches anew, and its steps and samples on."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

KEY = "accumulated_batches"  # in a checkpoint


class RankChange(Callback):
    """Aligns Lightning's count of batches where a run goes on with another number of ranks, or of micro-batches a step.

    Lightning tells by the number of batches which of them ends a step and when to validate. With other ranks a step is of another number
    of batches (`trainer.accumulate_grad_batches`), so that the count becomes steps taken times that. Where the samples go on is the data
    loader's affair, which refuses what it cannot do. Keep ranks times batch size times accumulated batches, and the curve goes on.

    A checkpoint from within a step is refused: the gradients of the micro-batches before it are lost, and the step would be taken from
    the others' alone.
    """

    def __init__(self) -> None:
        self._told: str | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep how many micro-batches a step takes."""
        checkpoint[KEY] = trainer.accumulate_grad_batches

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Change the counts in the checkpoint, which the loops read after this.

        Raises:
            ValueError: the checkpoint lies within a step's micro-batches.
        """
        if trainer.state.fn != "fit":
            return
        loop = checkpoint["loops"]["fit_loop"]
        loaders = loop["state_dict"].get("combined_loader") or [{}]
        ranks = loaders[0].get("world_size", trainer.world_size)
        now = trainer.accumulate_grad_batches
        progress = loop["epoch_loop.batch_progress"]
        before = progress["current"]["ready"]
        steps = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["current"]["completed"]
        then = checkpoint.get(KEY)
        if then is None:  # written before this was kept: by its counts, or not to be told
            if ranks == trainer.world_size:
                return
            then = before // steps if steps else now
        if before % then and not progress["is_last_batch"]:  # an epoch's last step may be of fewer
            raise ValueError(
                f"cannot resume: the checkpoint was written within a step, after {before % then} of its {then} micro-batches, whose "
                "gradients are not in it; go on from one that was written behind a step (--ckpt_path last). A validation falls behind a "
                "step where trainer.val_check_interval is a multiple of trainer.accumulate_grad_batches"
            )
        if (ranks, then) == (trainer.world_size, now):
            return
        shift = steps * now - before
        if progress["is_last_batch"]:  # with fewer batches than the epoch has it would begin in its midst
            shift = max(shift, 0)
        for counts in (progress["current"], progress["total"]):
            for name in counts:
                counts[name] += shift
        self._told = (
            f"the checkpoint is of {_described(ranks, then)}, this run of {_described(trainer.world_size, now)}: "
            "the samples go on where they were"
        )
        if ranks * then != trainer.world_size * now:
            self._told += (
                f". With the same data.batch_size a step reads {trainer.world_size * now / (ranks * then):g} times what it did: "
                "trainer.accumulate_grad_batches and data.batch_size set that"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what has changed, now that the data has been taken up."""
        if self._told is not None and trainer.is_global_zero:
            print(self._told, flush=True)
        self._told = None


def _described(ranks: int, accumulated: int) -> str:
    return f"{ranks} process(es) with {accumulated} micro-batch(es) a step"
