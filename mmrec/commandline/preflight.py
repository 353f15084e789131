"""What can be known to be wrong before anything is built or written."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import torch
from jsonargparse import ArgumentParser, Namespace

from lightning_modules.checks import check_hyperparameters, check_vocabulary
from lightning_modules.fsdp2_strategy import NAME, FSDP2Strategy
from lightning_modules.mm_rec_module import SUPPORTED_PRECISIONS
from lightning_modules.sharding import check_shardable
from mmrec.commandline.checkpoints import require_fitting_checkpoint
from mmrec.commandline.class_paths import imported_class
from mmrec.commandline.errors import BadInputError
from mmrec.commandline.memory_check import check_memory
from mmrec.commandline.trainer_checks import check_trainer
from mmrec.config import MMRecConfig

SHARDING = f"{FSDP2Strategy.__module__}.{FSDP2Strategy.__qualname__}"
GRADIENTS_KEY = "auxiliary_curves.gradients_every_n_steps"


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
        require_torchao(config.model.as_dict())
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
    strategy = config.trainer.strategy
    if (strategy.get("class_path") if isinstance(strategy, Namespace) else strategy) not in (NAME, SHARDING):
        return
    check_shardable(config.model.as_dict())
    curves = "auxiliary_curves" in config and "auxiliary_curves" not in (config.get("disable_callbacks") or [])
    if curves and config.model.network.use_uboo and config.auxiliary_curves.gradients_every_n_steps > 0:
        raise BadInputError(f"{GRADIENTS_KEY}: gradients of weights in shards cannot be compared; set it to 0 with FSDP2Strategy")


def require_torchao(hparams: Mapping[str, Any]) -> None:
    """Raise BadInputError where the optimiser or FP8 needs torchao and it is not installed; without importing it, which takes seconds."""
    wants = "model.fp8" if hparams["fp8"] else f"model.optimizer={hparams['optimizer']}" if hparams["optimizer"] != "adamw" else None
    if wants is not None and find_spec("torchao") is None:
        raise BadInputError(f"{wants} needs torchao, which is not installed; install it: pip install torchao, or the extra [train]")


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
