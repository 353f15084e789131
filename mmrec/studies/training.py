"""Training one run of a study: Lightning's Trainer around the module, data and callbacks of `fit`, with everything kept in memory."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch._dynamo
from jsonargparse import Namespace
from lightning.pytorch import Trainer, seed_everything

import datamodules  # noqa: F401  build_data_module imports nothing
from callbacks import AuxiliaryLossCurves, StepLatency
from lightning_modules import BaselineLightningModule, MMRecLightningModule
from lightning_modules.checks import check_vocabulary
from mmrec.commandline.errors import BadInputError
from mmrec.commandline.library_warnings import ignore_known_warnings
from mmrec.commandline.preflight import build_data_module
from mmrec.config import MMRecConfig
from mmrec.measuring.machine import device, machine
from mmrec.studies.recording import MainLosses, MemoryLogger, StepPeak
from mmrec.studies.runs import Row, Run
from mmrec.studies.statistics import detrended_variance, smoothed

_DIAGNOSES = 10  # of the auxiliary loss, in a run
_KEPT = ("val/", "aux/grad_", "aux/share_of_total")  # tags whose curves are kept, beside those of layers' means
_OF_LAYERS = ("gate_jacobian_max", "gate_jacobian_share")
_OF_PLANNING_LAYERS = ("target_variance", "target_effective_rank")


class Outcome(NamedTuple):
    """A run's row, and its curves by name, each a list of (step, value)."""

    row: Row
    curves: dict[str, list[tuple[int, float]]]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run's network after its training, and what was recorded meanwhile.

    Attributes:
        run: what was trained.
        module: the Lightning module, with the `network`.
        data: the data module.
        trainer: as it is after `fit`.
        losses: every step's.
        logger: the scalars.
        seconds: of the training; validations on the way are included, and with UBÖO its diagnoses.
        peak_gib: see `StepPeak`; None on a CPU.
    """

    run: Run
    module: Any
    data: Any
    trainer: Trainer
    losses: MainLosses
    logger: MemoryLogger
    seconds: float
    peak_gib: float | None

    def parameters(self) -> Row:
        """How many weights the network has, and how many more only its training needed, in millions."""
        network = self.module.network
        everything, training_only = network.num_parameters(), 0
        if not self.run.is_baseline:
            training_only = everything - network.num_parameters(training_only=False)
        return {"params_m": round((everything - training_only) / 1e6, 3), "training_only_params_m": round(training_only / 1e6, 3)}

    def validate(self) -> Row:
        """The losses on held-out data: of the first source `val_loss`, of others `val_loss_<name>`, in nats a token."""
        self.data.validation_batches = self.run.final_batches
        results = self.trainer.validate(self.module, datamodule=self.data, verbose=False)[0]
        row: Row = {"val_loss": results["val/loss"]}
        for name in self.data.validation_names[1:]:
            row[f"val_loss_{name}"] = results[f"val/{name}/loss"]
        return row

    @contextmanager
    def evaluation(self) -> Iterator[Any]:
        """The network on the current device, in evaluation mode, without gradients and in the training's precision."""
        network = self.module.network.to(device()).eval()  # the Trainer leaves it on the CPU
        with torch.no_grad(), self.trainer.precision_plugin.val_step_context():
            yield network


def check(run: Run) -> None:
    """Refuse bad settings of a run before anything of its study is trained.

    Raises:
        BadInputError: of its network or its training, naming the run.
        ValueError, FileNotFoundError, PermissionError, NotADirectoryError: of its data; one line, naming the thing and the remedy.
        ModuleNotFoundError: a package that a baseline's layers come from.
    """
    try:
        with torch.device("meta"):
            module = _module(run)
    except (TypeError, ValueError) as error:
        raise BadInputError(f"{run.study}, {run.variant or run.model}: {error}") from error
    data = _data(run)
    data.check()
    check_vocabulary(getattr(data, "vocab_size", None), module.config.vocab_size)


def fit(run: Run) -> Trained:
    """Train a run's network on the current device; what is then measured of it is its study's business."""
    where = device()
    ignore_known_warnings(".*does not have many workers")  # memory-mapped tokens need none
    torch._dynamo.reset()  # its limits are a process's, and a worker trains networks of many shapes
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # what devices there are, a line for every run
    seed_everything(run.seed, verbose=False)
    data, module = _data(run), _module(run)
    losses, logger, peak = MainLosses(), MemoryLogger(), StepPeak()
    trainer = _trainer(run, where, [losses, *_callbacks(run, module), peak], logger)
    began = time.perf_counter()
    trainer.fit(module, datamodule=data)
    seconds = time.perf_counter() - began
    return Trained(run=run, module=module, data=data, trainer=trainer, losses=losses, logger=logger, seconds=seconds, peak_gib=peak.gib)


def train(run: Run) -> Outcome:
    """Train a run and validate it: what a convergence study wants of it."""
    trained = fit(run)
    by_step, logger = trained.losses.by_step(run.accumulate), trained.logger
    curves = {"train/loss_main": smoothed(by_step)}
    # Before the last validation: it takes all of the held-out text, those on the way a part, and a curve must be of one text.
    curves |= {tag: _rounded(points) for tag, points in logger.scalars.items() if tag.startswith(_KEPT) and not tag.endswith("ppl")}
    row = run.description() | {
        **trained.parameters(),
        **trained.validate(),
        "loss_variance": detrended_variance(by_step),
        "steps_to_baseline": None,  # known once all runs of the study are
        "peak_gib": trained.peak_gib,
        "seconds": round(trained.seconds, 1),
        "tokens_per_s": logger.last("throughput/tokens_per_second"),
        "grad_cosine": logger.last("aux/grad_cosine"),
        "grad_norm_ratio": logger.last("aux/grad_norm_ratio"),
        **{name: logger.mean_of_layers(name) for name in _OF_LAYERS},
        **{name: logger.mean_of_layers(name, _first_planning_layer(run)) for name in _OF_PLANNING_LAYERS},
        **machine(device()),
    }
    return Outcome(row, curves)


def _first_planning_layer(run: Run) -> int:
    network = run.network
    return network.first_planning_layer if isinstance(network, MMRecConfig) else 0


def _data(run: Run) -> Any:
    spec = run.content["data"]
    arguments = Namespace(**{**spec["init_args"], "seed": run.seed})
    return build_data_module(Namespace(class_path=spec["class_path"], init_args=arguments))


def _module(run: Run) -> Any:
    options = {name: value for name, value in run.content["model"].items() if name != "network"}
    if run.is_baseline:
        return BaselineLightningModule(run.network, **options)  # type: ignore[arg-type]
    return MMRecLightningModule(run.network, **options)  # type: ignore[arg-type]


def _callbacks(run: Run, module: Any) -> list[Any]:
    latency = StepLatency()
    if not module.network.use_uboo:
        return [latency]
    every = max(1, run.steps // _DIAGNOSES)
    return [AuxiliaryLossCurves(diagnostics_every_n_steps=every, gradients_every_n_steps=every, histograms=False), latency]


def _trainer(run: Run, where: torch.device, callbacks: list[Any], logger: MemoryLogger) -> Trainer:
    settings = run.content["trainer"]
    kept = ("precision", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "deterministic")
    return Trainer(
        **{name: settings[name] for name in kept if name in settings},
        accelerator="gpu" if where.type == "cuda" else "cpu",
        devices=[where.index] if where.type == "cuda" else 1,
        use_distributed_sampler=False,
        val_check_interval=max(1, run.steps // run.validations) * run.accumulate,
        num_sanity_val_steps=0,
        log_every_n_steps=max(1, run.steps // 20),
        logger=logger,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _rounded(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(step, float(f"{value:.5g}")) for step, value in points]
