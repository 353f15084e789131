"""AuxiliaryLossCurves: whether UBÖO's auxiliary loss is alive, how strong it pulls, and where it has collapsed."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.scalars import is_due, log_scalars, summary_writers
from callbacks.tensorboard_layout import custom_scalar_layout


class AuxiliaryLossCurves(Callback):
    """Curves of the auxiliary loss, grouped in TensorBoard's custom-scalar page together with the run's other tags.

    Every logged step: `aux/layer_NN/loss` (unscaled, mean of the ranks) and `aux/share_of_total`.

    Every `diagnostics_every_n_steps` and at the last step, from rank 0's first micro-batch: `aux/layer_NN/target_variance`,
    `…/target_effective_rank`, `…/gate_jacobian_max`, `…/gate_jacobian_share`, and a histogram over the layers of each
    (`aux/by_layer/…`), as of the loss.

    Every `gradients_every_n_steps` and at the last step: `aux/grad_norm_ratio` and `aux/grad_cosine` of the auxiliary gradient against
    the main one, on the first `gradient_sequences` of the batch; neither gradients nor random states of the training are touched.

    The module must have `step_losses`, `last_loss`, `diagnostics_wanted` and `auxiliary_gradient_statistics(batch)`.
    """

    def __init__(
        self, diagnostics_every_n_steps: int = 50, gradients_every_n_steps: int = 50, gradient_sequences: int = 1, histograms: bool = True
    ) -> None:
        """Choose how often.

        Args:
            diagnostics_every_n_steps: optimiser steps between diagnostics, each one more forward pass; 0 for none.
            gradients_every_n_steps: optimiser steps between comparisons of gradients, each two more passes and room for two gradients
                of the network; 0 for none.
            gradient_sequences: sequences of the batch that they are compared on.
            histograms: whether to write the histograms.
        """
        for name, value in (("diagnostics_every_n_steps", diagnostics_every_n_steps), ("gradients_every_n_steps", gradients_every_n_steps)):
            if value < 0:
                raise ValueError(f"AuxiliaryLossCurves: {name} is {value}; give a number of steps, or 0 for never")
        if gradient_sequences < 1:
            raise ValueError(f"AuxiliaryLossCurves: gradient_sequences is {gradient_sequences}; give at least 1")
        self.diagnostics_every_n_steps = diagnostics_every_n_steps
        self.gradients_every_n_steps = gradients_every_n_steps
        self.gradient_sequences = gradient_sequences
        self.histograms = histograms
        self._step: int | None = None  # the optimiser step under way
        self._diagnostics: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell TensorBoard how to group the charts."""
        self._step = None
        for writer in summary_writers(trainer):
            writer.add_custom_scalars(custom_scalar_layout())

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """In a step's first micro-batch, ask for what is due."""
        step = trainer.global_step
        if step == self._step:
            return
        self._step, self._diagnostics, self._gradients = step, {}, {}
        pl_module.diagnostics_wanted = is_due(trainer, step, self.diagnostics_every_n_steps)
        if is_due(trainer, step, self.gradients_every_n_steps) and pl_module.network.use_uboo:
            part = {name: value[: self.gradient_sequences] for name, value in batch.items()}
            self._gradients = pl_module.auxiliary_gradient_statistics(part)

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        """Keep the diagnostics of the first micro-batch."""
        if pl_module.diagnostics_wanted:
            self._diagnostics, pl_module.diagnostics_wanted = pl_module.last_loss.diagnostics, False

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Where the optimiser has stepped, log what there is."""
        if self._step is None or trainer.global_step == self._step:
            return
        step, self._step = self._step, None
        values = {f"aux/{name}": float(value) for name, value in self._gradients.items()}
        by_layer = {name: tensor.tolist() for name, tensor in self._diagnostics.items()}
        losses = pl_module.step_losses
        if losses is not None and pl_module.network.use_uboo:
            by_layer["loss"] = losses.auxiliary_by_layer.tolist()
            values["aux/share_of_total"] = float(losses.auxiliary / losses.loss)
        for name, layers in by_layer.items():
            values |= {f"aux/layer_{index:02d}/{name}": value for index, value in enumerate(layers)}
        log_scalars(trainer, values, step)
        if self.histograms and self._diagnostics:
            for writer in summary_writers(trainer):
                for name, tensor in self._diagnostics.items():
                    _add_histogram(writer, f"aux/by_layer/{name}", tensor, step)
                if losses is not None and pl_module.network.use_uboo:
                    _add_histogram(writer, "aux/by_layer/loss", losses.auxiliary_by_layer, step)


def _add_histogram(writer: Any, name: str, tensor: Tensor, step: int) -> None:
    """Write one, but of numbers that are not finite: TensorBoard's raises, and would end a run that SkippedSteps has more to say of."""
    values = tensor.detach().float().cpu()
    if values.isfinite().all():
        writer.add_histogram(name, values, step)
