"""RankChange: a run that goes on with another number of ranks counts its batches anew, and its steps and samples on."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class RankChange(Callback):
    """Aligns Lightning's count of batches where a checkpoint of another number of ranks is resumed.

    Lightning tells by the number of batches which of them ends a step and when to validate. With other ranks a step is of another number
    of batches (`trainer.accumulate_grad_batches`), so that the count becomes steps taken times that. Where the samples go on is the data
    loader's affair, which refuses what it cannot do. Keep ranks times batch size times accumulated batches, and the curve goes on.
    """

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Change the counts in the checkpoint, which the loops read after this.

        Raises:
            ValueError: the checkpoint lies within a step's micro-batches, whose gradients another number of ranks cannot share.
        """
        if trainer.state.fn != "fit":
            return
        loop = checkpoint["loops"]["fit_loop"]
        loaders = loop["state_dict"].get("combined_loader") or [{}]
        then = loaders[0].get("world_size", trainer.world_size)
        if then == trainer.world_size:
            return
        progress = loop["epoch_loop.batch_progress"]
        steps = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["current"]["completed"]
        before = progress["current"]["ready"]
        if before % max(1, steps):
            raise ValueError(
                f"cannot resume with {trainer.world_size} process(es): the checkpoint of {then} was written within a step; start {then}, "
                "or resume from one that was written behind a step"
            )
        shift = steps * trainer.accumulate_grad_batches - before
        for counts in (progress["current"], progress["total"]):
            for name in counts:
                counts[name] += shift
        if trainer.is_global_zero:
            print(
                f"the checkpoint is of {then} process(es), this run of {trainer.world_size}: the samples go on where they were", flush=True
            )
