"""MMRecLightningModule: what a step, a validation and an optimiser are for an MM-Rec network."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from callbacks.scalars import is_log_step, log_scalars
from lightning_modules import sharding
from lightning_modules.checks import check_batch_form, check_checkpoint_shapes, check_hyperparameters, check_token_range, check_vocabulary
from lightning_modules.compilation import compile_blocks
from lightning_modules.float8 import check_float8, check_float8_batch, convert_to_float8
from lightning_modules.gradients import auxiliary_gradient_statistics, clip_gradients
from lightning_modules.graphed_step import GraphedStep
from lightning_modules.optimizers import (
    OptimizerName,
    check_precision,
    check_saved_optimizer,
    import_torchao,
    learning_rate_of,
    make_optimizer,
    plain_state,
    set_learning_rate,
    whole_state,
)
from lightning_modules.parameter_groups import parameter_groups
from lightning_modules.schedules import linear_change, warmup_cosine
from lightning_modules.skipping import give_gradients_back, loss_of_step_taken, spoiled_unless_finite
from lightning_modules.step_losses import StepLosses
from mmrec.config import MMRecConfig
from mmrec.model import LossOutput, MMRecModel

SUPPORTED_PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true")
FIRST_BATCHES_CHECKED = 2  # on a device where looking at the ids means waiting for it


class MMRecLightningModule(LightningModule):
    """Trains an MM-Rec network on batches of `input_ids` and `labels`, both int64 (B, T), −1 where nothing is to be learned.

    Scalars go to the loggers directly, at the number of optimiser steps taken before the measurement, so that `train/loss` and
    `val/loss` at one step speak of the same weights. `self.log` would add an `epoch` tag and put a validation one step too early.

    In a step every micro-batch and every rank counts equally, in the gradient and in the losses logged, whatever its number of labels:
    packed sequences all have the same number. Validation weights each batch with its labels.

    Attributes:
        network: the MMRecModel.
        config: its MMRecConfig.
        last_loss: LossOutput of the latest micro-batch of this rank, detached; None before the first.
        last_step_loss: 0-dim, the total loss of the latest step, mean of this rank's micro-batches; None before the first.
        last_taken_loss: the same of the latest step that was not skipped for a loss or gradient that was not finite.
        step_losses: StepLosses of the latest step if it is one that is logged, else None.
        last_gradient_norm: 0-dim, the latest gradient norm before clipping; None before the first step.
        last_validation: loss and perplexity of the latest validation, by tag.
        diagnostics_wanted: set it before a step, and `last_loss.diagnostics` is filled.
        tokens_seen: input tokens of all ranks, as of the latest logged step or checkpoint.
    """

    # What is trained; a subclass may train another network that answers to the same calls.
    config_class: Any = MMRecConfig
    network_class: Any = MMRecModel

    def __init__(
        self,
        network: MMRecConfig,
        learning_rate: float = 3e-4,
        min_learning_rate_ratio: float = 0.1,
        warmup_steps: int = 100,
        decay_steps: int | None = None,
        weight_decay: float = 0.1,
        decay_embeddings: bool = False,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        lambda_P_final: float | None = None,
        lambda_P_anneal_steps: int = 0,
        optimizer: OptimizerName = "adamw",
        fp8: bool = False,
        compile_blocks: bool = False,
        cuda_graph: bool = False,
        check_batches: bool = False,
    ) -> None:
        """Build the network and remember how to train it.

        Args:
            network: sizes and mechanisms of the network.
            learning_rate: AdamW's peak learning rate.
            min_learning_rate_ratio: the learning rate after the decay, as a share of the peak.
            warmup_steps: optimiser steps of linear warm-up.
            decay_steps: optimiser step at which the cosine ends. None: trainer.max_steps.
            weight_decay: decoupled weight decay of the matrices.
            decay_embeddings: whether the embedding decays as well.
            betas: AdamW's decay rates of the two moments.
            eps: AdamW's ε.
            lambda_P_final: where the auxiliary loss's weight ends. None: it stays at network.lambda_P.
            lambda_P_anneal_steps: optimiser steps over which it gets there, linearly.
            optimizer: adamw, fused on a GPU; adamw_8bit, with moments of 8 bits; adamw_bf16, with moments of bf16 and bf16-true. The last
                two are torchao's (their step is our kernel on a GPU) and round bf16 weights stochastically.
            fp8: the blocks' large products in FP8 (torchao); slow without compile_blocks.
            compile_blocks: `torch.compile` each block in place.
            cuda_graph: replay forward and backward of a micro-batch as one CUDA graph, so that no launch waits for Python; on one GPU
                (with several, and on a CPU, it does nothing). Sequences of varying length would each be captured anew.
            check_batches: compare every batch's ids with the vocabulary on a GPU too (waits for it at every step); a CPU always does.
        """
        super().__init__()
        if isinstance(network, Mapping):  # from a checkpoint, where the configuration lies as a plain dict
            network = self.config_class(**network)
        # Plain types only: a dataclass in a checkpoint cannot be loaded with weights_only=True.
        hparams = {
            "network": asdict(network),
            "learning_rate": learning_rate,
            "min_learning_rate_ratio": min_learning_rate_ratio,
            "warmup_steps": warmup_steps,
            "decay_steps": decay_steps,
            "weight_decay": weight_decay,
            "decay_embeddings": decay_embeddings,
            "betas": list(betas),
            "eps": eps,
            "lambda_P_final": lambda_P_final,
            "lambda_P_anneal_steps": lambda_P_anneal_steps,
            "optimizer": optimizer,
            "fp8": fp8,
            "compile_blocks": compile_blocks,
            "cuda_graph": cuda_graph,
            "check_batches": check_batches,
        }
        check_hyperparameters(hparams)
        self.save_hyperparameters(hparams)
        self.config = network
        self.network = self.network_class(network)
        self.last_loss: LossOutput | None = None
        self.last_step_loss: Tensor | None = None
        self.last_taken_loss: Tensor | None = None
        self.step_losses: StepLosses | None = None
        self.last_gradient_norm: Tensor | None = None
        self.diagnostics_wanted = False
        self.tokens_seen = 0
        self._unreduced_tokens = 0  # of this rank, since tokens_seen was brought up to date
        self._micro_batches: list[LossOutput] = []
        self._batches_checked = 0
        self._means: list[MeanMetric] = []
        self._graphed: GraphedStep | None = None
        self._blocks_compiled = self._in_float8 = False
        self.last_validation: dict[str, float] = {}

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (B, T, vocab) of token ids (B, T)."""
        return self.network(input_ids)

    def flops_per_token(self, seq_len: int) -> int:
        """FLOPs of a training step (forward and backward) for one token of a sequence of `seq_len` tokens."""
        return self.network.flops_per_token(seq_len)

    def auxiliary_gradient_statistics(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`grad_norm_ratio` ‖g_aux‖/‖g_main‖ and `grad_cosine` of the two, 0-dim each; leaves `.grad` and random states alone."""
        sharding.check_gradient_curves(sharding.is_sharded(self.network))
        with self.trainer.precision_plugin.train_step_context():
            return auxiliary_gradient_statistics(self.network, batch)

    # ---- before training

    def setup(self, stage: str) -> None:
        """Refuse what cannot train (precision, vocabulary, no end of the schedule); go to FP8 and compile the blocks where asked."""
        if self.trainer.precision not in SUPPORTED_PRECISIONS:
            choices = ", ".join(SUPPORTED_PRECISIONS)
            raise ValueError(f"trainer.precision={self.trainer.precision} is not supported; choose one of {choices}")
        check_vocabulary(getattr(getattr(self.trainer, "datamodule", None), "vocab_size", None), self.config.vocab_size)
        if stage == "fit":
            self._schedule_end()
            self._require_optimizer()
        if stage == "fit" and self.hparams["fp8"] and not self._in_float8:
            check_float8(self.network, self.trainer.strategy.root_device, self.trainer.precision)
            convert_to_float8(self.network)
            self._in_float8 = True
        if self.hparams["compile_blocks"] and not self._blocks_compiled:
            compile_blocks(self.network.blocks)
            self._blocks_compiled = True

    def configure_model(self) -> None:
        """Shard the network where the strategy wants it so (FSDP2Strategy); nothing otherwise."""
        sharding.configure(self)

    def _schedule_end(self) -> int:
        # Not trainer.estimated_stepping_batches: asking for it before a checkpoint is restored restarts the data at 0.
        steps = self.hparams["decay_steps"] if self.hparams["decay_steps"] is not None else self.trainer.max_steps
        if steps < 1:
            raise ValueError("the learning rate's schedule has no end: set trainer.max_steps or model.decay_steps")
        return steps

    def _require_optimizer(self) -> None:
        # Here and not at the first step; and not where the module is made: a run's config must evaluate without torchao, too.
        name = self.hparams["optimizer"]
        check_precision(name, self.trainer.precision)
        if name != "adamw":
            import_torchao(f"model.optimizer={name}")

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW over the two parameter groups, with warm-up and cosine counted in optimiser steps."""
        hparams = self.hparams
        groups = parameter_groups(
            self.network, hparams["weight_decay"], self.network.no_weight_decay_parameters(), decay_embeddings=hparams["decay_embeddings"]
        )
        optimizer = make_optimizer(hparams["optimizer"], groups, hparams["learning_rate"], tuple(hparams["betas"]), hparams["eps"])
        factor = warmup_cosine(hparams["warmup_steps"], self._schedule_end(), hparams["min_learning_rate_ratio"])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def on_train_start(self) -> None:
        """Let the configuration decide, not the checkpoint: a resumed optimiser gets this run's rates, betas and ε."""
        self._micro_batches = []  # of a step that an error broke off, where the module is trained again
        hparams = self.hparams
        for optimizer, scheduler in zip(self.trainer.optimizers, self.trainer.lr_scheduler_configs, strict=True):
            base, count = hparams["learning_rate"], self.trainer.global_step
            scheduler.scheduler.base_lrs = [base] * len(optimizer.param_groups)
            for group, factor in zip(optimizer.param_groups, scheduler.scheduler.lr_lambdas, strict=True):
                decay = hparams["weight_decay"] if group["name"] == "decay" else 0.0
                set_learning_rate(group, base * factor(count))
                group.update(initial_lr=base, weight_decay=decay)
                group.update(betas=tuple(hparams["betas"]), eps=hparams["eps"])

        graphed = hparams["cuda_graph"] and self.device.type == "cuda" and self.trainer.world_size == 1
        self._graphed = GraphedStep(self.network) if graphed else None

    def on_train_end(self) -> None:
        """Give back what the graphs hold."""
        if self._graphed is not None:
            self._graphed.close()
        self._graphed = None

    # ---- a training step

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The total loss, main plus auxiliary, 0-dim."""
        self._check_batch(batch)
        if self.hparams["lambda_P_final"] is not None:
            self.network.lambda_P = linear_change(
                self.config.lambda_P, self.hparams["lambda_P_final"], self.hparams["lambda_P_anneal_steps"], self.trainer.global_step
            )
        if self._graphed is None:
            output = self.network.loss(batch, diagnostics=self.diagnostics_wanted)
        else:
            output = self._graphed.run(batch, first=not self._micro_batches, scale=1 / self.trainer.accumulate_grad_batches)
            if self.diagnostics_wanted:
                output = output._replace(diagnostics=self.network.diagnose(batch))
        self.last_loss = output.detach()
        self._micro_batches.append(self.last_loss)
        self._unreduced_tokens += batch["input_ids"].numel()
        self.log("train/loss", self.last_loss.loss, logger=False)  # for callbacks that monitor; the loggers get the mean of the step
        return spoiled_unless_finite(output.loss)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The gradients; nothing is left to do where a graph made them with the loss."""
        if self._graphed is None:
            loss.backward(*args, **kwargs)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Forget the gradients of the step before; a graph does so itself."""
        if self._graphed is None:
            optimizer.zero_grad()

    def _check_batch(self, batch: Mapping[str, Tensor]) -> None:
        check_batch_form(batch)
        if self._in_float8:
            check_float8_batch(batch["input_ids"])
        self._batches_checked += 1
        if self.device.type == "cpu" or self.hparams["check_batches"] or self._batches_checked <= FIRST_BATCHES_CHECKED:
            check_token_range(batch, self.config.vocab_size)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip as the Trainer was told, and keep the norm from before. Lightning's own clipping refuses fused AdamW in bf16-mixed."""
        self.last_gradient_norm = clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, then log the step's losses every `trainer.log_every_n_steps` steps, the first and the last included."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        give_gradients_back(optimizer)
        micro_batches, self._micro_batches, self.step_losses = self._micro_batches, [], None
        self.last_step_loss = torch.stack([micro_batch.loss for micro_batch in micro_batches]).mean()
        self.last_taken_loss = loss_of_step_taken(self.last_step_loss, self.last_gradient_norm, self.last_taken_loss)
        step = self.trainer.global_step  # still the number of steps before this one
        if is_log_step(self.trainer, step):
            self._log_step(step, micro_batches, learning_rate_of(optimizer))

    def _log_step(self, step: int, micro_batches: list[LossOutput], learning_rate: float) -> None:
        flat = [torch.cat([torch.stack([m.loss, m.main, m.auxiliary]), m.auxiliary_by_layer]).float() for m in micro_batches]
        mean = self.trainer.strategy.reduce(torch.stack(flat).mean(0), reduce_op="mean")
        self.step_losses = StepLosses(step, mean[0], mean[1], mean[2], mean[3:])
        self._update_tokens_seen()
        loss, main, auxiliary = mean[:3].tolist()
        norm = float(self.last_gradient_norm) if self.last_gradient_norm is not None else float("nan")
        losses = {"train/loss": loss, "train/loss_main": main, "train/loss_aux": auxiliary}
        log_scalars(self.trainer, losses | {"train/grad_norm": norm, "train/lr": learning_rate, "train/tokens": self.tokens_seen}, step)

    def _update_tokens_seen(self) -> None:
        """Add what all ranks have read since the last time; a collective."""
        count = torch.tensor(self._unreduced_tokens, dtype=torch.int64, device=self.device)
        self.tokens_seen += int(self.trainer.strategy.reduce(count, reduce_op="sum"))
        self._unreduced_tokens = 0

    # ---- evaluation

    def on_validation_epoch_start(self) -> None:
        """Start a token-weighted mean for every validation loader."""
        self._start_means(len(self.trainer.num_sanity_val_batches if self.trainer.sanity_checking else self.trainer.num_val_batches))

    def on_test_epoch_start(self) -> None:
        """Start a token-weighted mean for every test loader."""
        self._start_means(len(self.trainer.num_test_batches))

    def _start_means(self, count: int) -> None:
        # Made anew and in float64 here: as submodules they would be cast to bf16 with the network.
        self._means = [MeanMetric().set_dtype(torch.float64).to(self.device) for _ in range(count)]

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add the batch's main loss, weighted with its tokens, to its source's mean."""
        self._check_batch(batch)
        output = self.network.loss(batch)
        self._means[dataloader_idx].update(output.main.double(), output.num_tokens)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log `val/loss` and `val/ppl`, and `val/<source>/…` where there are several sources."""
        self._finish_means("val")

    def on_test_epoch_end(self) -> None:
        """Log `test/loss` and `test/ppl`, and `test/<source>/…` where there are several sources."""
        self._finish_means("test")

    def _finish_means(self, prefix: str) -> None:
        """Log the means under `<prefix>/`; of several sources the plain `<prefix>/loss` and `<prefix>/ppl` are the first one's."""
        names = getattr(getattr(self.trainer, "datamodule", None), "validation_names", None)
        values: dict[str, float] = {}
        for index, mean in enumerate(self._means):
            loss = mean.compute()  # over all ranks
            name = names[index] if names is not None and index < len(names) else str(index)
            for stem in ([prefix] if index == 0 else []) + ([f"{prefix}/{name}"] if len(self._means) > 1 else []):
                values |= {f"{stem}/loss": float(loss), f"{stem}/ppl": float(loss.exp())}
        self._means = []
        self.last_validation = values
        if self.trainer.state.fn != "fit":
            self.log_dict(values)  # `trainer.validate` prints and returns these
            return
        # Lightning drops what is logged while it checks sanity; here that run is the measurement before the first step.
        log_scalars(self.trainer, values, self.trainer.global_step)
        if not self.trainer.sanity_checking:
            self.log_dict(values, logger=False)

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """How well the network foresaw each token.

        Returns:
            On the CPU: `log_likelihood` fp32 (B, T), natural logarithm, 0 where the label is −1; `loss` fp32 (B,), the negative of its mean
            over a sequence's labels; `num_tokens` int64 (B,).
        """
        self._check_batch(batch)
        rows = []
        for index, labels in enumerate(batch["labels"]):  # one sequence at a time: all logits of a batch can be gigabytes
            reset = batch["reset"][index : index + 1] if "reset" in batch else None
            logits = self.network(batch["input_ids"][index : index + 1], reset=reset)
            rows.append(-F.cross_entropy(logits[0].float(), labels, ignore_index=-1, reduction="none"))
        log_likelihood, num_tokens = torch.stack(rows).cpu(), (batch["labels"] != -1).sum(1).cpu()
        return {"log_likelihood": log_likelihood, "loss": -log_likelihood.sum(1) / num_tokens.clamp(min=1), "num_tokens": num_tokens}

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the tokens seen, and the configuration as the network has it now (`set_hem` changes it); every rank takes part."""
        self._update_tokens_seen()
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]["network"] = asdict(self.network.config)
        checkpoint["tokens_seen"] = self.tokens_seen
        if "optimizer_states" in checkpoint:  # weights alone otherwise
            checkpoint["optimizer_states"] = [plain_state(state) for state in checkpoint["optimizer_states"]]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the parameters of another network, or moments of another optimiser, in one line; take up the count of tokens."""
        check_checkpoint_shapes(checkpoint, self, self.config)
        if self._trainer is not None and self._trainer.state.fn == "fit" and "optimizer_states" in checkpoint:
            check_saved_optimizer(checkpoint, self.hparams["optimizer"])
            if self.hparams["optimizer"] == "adamw_8bit":
                checkpoint["optimizer_states"] = [whole_state(state) for state in checkpoint["optimizer_states"]]
        self.tokens_seen = checkpoint.get("tokens_seen", 0)
        self._unreduced_tokens = 0
