"""What can be known to be wrong before anything is built or written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Trainer

from callbacks import RankWatch, RunCheckpoint
from lightning_modules.checks import check_hyperparameters, check_vocabulary
from lightning_modules.fsdp2_strategy import FSDP2Strategy
from lightning_modules.mm_rec_module import SUPPORTED_PRECISIONS
from lightning_modules.optimizers import require_torchao
from lightning_modules.sharding import check_gradient_curves, check_shardable
from lightning_modules.strategies import TunedDDPStrategy
from mmrec.commandline.checkpoints import require_fitting_checkpoint
from mmrec.commandline.class_paths import imported_class
from mmrec.commandline.errors import BadInputError
from mmrec.commandline.memory_check import check_memory
from mmrec.commandline.strategy_kinds import FSDP2, asked_strategy
from mmrec.commandline.trainer_checks import check_trainer
from mmrec.config import MMRecConfig


def require_groups(config: Namespace, keys: Sequence[str]) -> None:
    """Raise BadInputError where a key that holds further keys was given a plain value: jsonargparse lets `trainer: 3` pass."""
    for key in keys:
        if key in config and not isinstance(config[key], Namespace | Mapping):
            raise BadInputError(f"{key}: expected a mapping of keys to values, got {config[key]!r}")


def require_values(config: Namespace, parser: ArgumentParser) -> None:
    """Raise BadInputError where a key was given null that takes none: jsonargparse lets any be null in a file."""
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        if hint is None or action.dest not in config or config[action.dest] is not None:
            continue
        if action.default is not None and type(None) not in get_args(hint):
            raise BadInputError(f"{action.dest} is null; give a value, or leave the key out for {action.default}")


def check_before_building(config: Namespace, checkpoint: Path | None, fitting: bool) -> None:
    """Check sizes, device, data, vocabulary and checkpoint of a parsed run config; a few seconds at most, nothing is written.

    Args:
        config: one subcommand's config.
        checkpoint: the checkpoint that will be loaded, if any.
        fitting: whether it is `fit` that will run.

    Raises:
        ValueError, OSError: one line each, as the part concerned says it.
    """
    try:
        network = MMRecConfig(**config.model.network.as_dict())
    except ValueError as error:  # its messages begin with the field's name
        raise BadInputError(f"model.network.{error}") from error
    check_hyperparameters(config.model.as_dict())
    precision = config.trainer.precision
    if precision is not None and _full_precision_name(precision) not in SUPPORTED_PRECISIONS:
        raise BadInputError(f"trainer.precision: {precision} is not supported; choose one of {', '.join(SUPPORTED_PRECISIONS)}")
    check_trainer(config)
    if fitting:
        check_strategy(config)
    if fitting and config.trainer.max_steps < 1 and config.model.decay_steps is None:
        raise BadInputError("trainer.max_steps: the run has no end; give the number of optimiser steps")
    if fitting:
        check_torchao(config.model.as_dict())
    require_device(config.trainer.accelerator)  # before the data: who has no GPU here need not prepare any
    if fitting:
        check_memory(config)
    data = build_data_module(config.data)
    if hasattr(data, "check"):
        data.check()
    check_vocabulary(getattr(data, "vocab_size", None), network.vocab_size)
    if checkpoint is not None:
        require_fitting_checkpoint(checkpoint, network)


def check_strategy(config: Namespace) -> None:
    """Raise ValueError where a run's other settings do not fit weights in shards."""
    if asked_strategy(config.trainer.strategy).kind != FSDP2:
        return
    check_shardable(config.model.as_dict())
    curves = "auxiliary_curves" in config and "auxiliary_curves" not in (config.get("disable_callbacks") or [])
    check_gradient_curves(curves and config.model.network.use_uboo and config.auxiliary_curves.gradients_every_n_steps > 0)


def check_torchao(hparams: Mapping[str, Any]) -> None:
    """Raise ModuleNotFoundError where the optimiser or FP8 needs torchao and it is not installed."""
    if hparams["fp8"]:
        require_torchao("model.fp8")
    if hparams["optimizer"] != "adamw":
        require_torchao(f"model.optimizer={hparams['optimizer']}")


def watch_remark(trainer: Trainer) -> str | None:
    """A line where the strategy's timeout ends a run that hangs before RankWatch has every rank's stacks written; None where it does not.

    On a CPU the ranks that wait leave their collective by an error then, on GPUs NCCL's watchdog aborts them.
    """
    watch = next((callback for callback in trainer.callbacks if isinstance(callback, RankWatch)), None)  # type: ignore[attr-defined]
    timeout = getattr(trainer.strategy, "_timeout", None)
    if watch is None or timeout is None or trainer.world_size == 1 or watch.hang_after_seconds == 0:
        return None
    # A beat to find the hang, and one until the others have heard of it.
    ended, needed = timeout.total_seconds(), watch.hang_after_seconds + 2 * watch.interval_seconds
    if needed < ended:
        return None
    key = "trainer.strategy.timeout" + ("_seconds" if isinstance(trainer.strategy, TunedDDPStrategy | FSDP2Strategy) else "")
    return (
        f"rank_watch.hang_after_seconds is {watch.hang_after_seconds:g}, and by {key} a run that hangs ends after {ended:g} s, before "
        f"every rank's stacks are written; give it more than {needed:g} s, or a lower rank_watch.hang_after_seconds"
    )


def validation_remark(trainer: Trainer) -> str | None:
    """A line where validations fall within a step: no run can go on from a `best.ckpt` of such a moment. None where they do not."""
    interval, batches = trainer.val_check_interval, trainer.accumulate_grad_batches
    keeps = any(isinstance(callback, RunCheckpoint) and callback.keep_best for callback in trainer.checkpoint_callbacks)
    if not keeps or not isinstance(interval, int) or interval % batches == 0:
        return None
    return (
        f"trainer.val_check_interval is {interval} batches and a step takes {batches} (trainer.accumulate_grad_batches): no run can go on "
        f"from a best.ckpt of a validation within a step; give a multiple of {batches}"
    )


def require_device(accelerator: Any) -> None:
    """Raise BadInputError where a GPU is asked for by name and none is seen; other accelerators are left to the Trainer."""
    if accelerator not in ("gpu", "cuda") or torch.cuda.is_available():
        return
    if accelerator == "gpu" and torch.backends.mps.is_available():  # which Lightning takes for one
        return
    raise BadInputError(
        f"trainer.accelerator: {accelerator}, and no GPU is seen here; use a machine with one (`python -m mmrec.cli doctor` looks for what "
        "is missing), or a config that fits a CPU, cpu_tiny"
    )


def build_data_module(spec: Namespace) -> Any:
    """The data module that a class path and its arguments describe; it opens nothing before its `setup`."""
    cls = imported_class(spec.class_path)
    if cls is None:
        raise BadInputError(f"data: no class {spec.class_path}")
    arguments = spec.get("init_args") or Namespace()
    return cls(**arguments.as_dict())


def _full_precision_name(precision: str | int) -> str:
    short = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}
    return short.get(str(precision), str(precision))
