"""What of the Trainer's arguments can be told to be wrong before it is built, each fault with its key and a remedy."""

import math
from importlib import import_module
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import Strategy, StrategyRegistry

from mmrec.commandline.class_paths import ALLOWED_PACKAGES, is_allowed
from mmrec.commandline.errors import BadInputError
from mmrec.nearest import did_you_mean, nearest_name

_MOST_SEED = 2**32 - 1  # NumPy's
_LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches")


def with_options(given: Any) -> Any:
    """The value of `trainer.strategy`, a class path without options as jsonargparse wants it: it takes one for a name of Lightning's.

    Raises:
        BadInputError: a class path that is none.
    """
    if not isinstance(given, str) or not is_allowed(given):
        return given
    module, _, name = given.rpartition(".")
    try:
        names = [one for one, value in vars(import_module(module)).items() if isinstance(value, type) and issubclass(value, Strategy)]
    except ModuleNotFoundError:
        raise BadInputError(f"trainer.strategy: there is no module {module}; correct the class path {given}") from None
    if name not in names:
        hint = did_you_mean(nearest_name(name, names, cutoff=0.5)) or "; correct the class path"
        raise BadInputError(f"trainer.strategy: {module} has no class {name}{hint}")
    return Namespace(class_path=given, init_args=Namespace())


def check_trainer(config: Namespace) -> None:
    """Check numbers, seed, device, accelerator and strategy of a parsed run config.

    Raises:
        BadInputError: the first fault.
    """
    trainer, seed = config.trainer, config.seed_everything
    if isinstance(seed, int) and not 0 <= seed <= _MOST_SEED:
        raise BadInputError(f"seed_everything is {seed}; give a whole number from 0 to {_MOST_SEED}")
    if trainer.default_root_dir == "":
        raise BadInputError("trainer.default_root_dir is empty; give a folder, or leave it out for runs/<config name>")
    fine = {
        "num_nodes": (trainer.num_nodes >= 1, "at least 1 machine"),
        "accumulate_grad_batches": (trainer.accumulate_grad_batches >= 1, "at least 1 batch a step"),
        "gradient_clip_val": (_is_limit(trainer.gradient_clip_val), "a finite number above 0, or null for no clipping"),
        "log_every_n_steps": (trainer.log_every_n_steps is None or trainer.log_every_n_steps >= 1, "at least 1 step, or null"),
        "val_check_interval": (_is_interval(trainer.val_check_interval), "at least 1 batch, or a share of an epoch from 0 to 1"),
        "check_val_every_n_epoch": (
            trainer.check_val_every_n_epoch is None or trainer.check_val_every_n_epoch >= 1,
            "at least 1 epoch, or null",
        ),
        **{name: (_is_limit(trainer[name]), "a number of batches, or a share of them from 0 to 1") for name in _LIMITS},
    }
    for name, (is_fine, remedy) in fine.items():
        if not is_fine:
            raise BadInputError(f"trainer.{name} is {trainer[name]}; give {remedy}")
    _check_name("accelerator", trainer.accelerator, ["auto", "gpu", *AcceleratorRegistry.available_accelerators()])
    _check_name("strategy", trainer.strategy, ["auto", *StrategyRegistry.available_strategies()])
    _check_devices(trainer.devices, trainer.accelerator)


def _is_limit(value: float | None) -> bool:
    return value is None or 0 <= value < math.inf


def _is_interval(value: Any) -> bool:
    return not isinstance(value, int | float) or (value >= 1 if isinstance(value, int) else 0 < value <= 1)


def _check_name(key: str, value: Any, names: list[str]) -> None:
    if not isinstance(value, str) or value.lower() in names:
        return
    if "." in value and not is_allowed(value):
        raise BadInputError(f"trainer.{key}: class path {value} is refused; a config may name classes of {', '.join(ALLOWED_PACKAGES)}")
    shown = [name for name in names if "_" not in name]
    hint = did_you_mean(nearest_name(value, names, cutoff=0.5)) or f"; choose one of {', '.join(shown)}, or give a class path"
    raise BadInputError(f"trainer.{key}: no {key} {value}{hint}")


def _check_devices(devices: Any, accelerator: Any) -> None:
    if devices == "auto" or not isinstance(accelerator, str):
        return
    wanted = _device_numbers(devices)
    if accelerator == "cpu":
        if not isinstance(wanted, int) or wanted < 1:
            raise BadInputError(f"trainer.devices is {devices}; give a number of processes, at least 1")
        return
    if wanted is None or wanted == 0 or (isinstance(wanted, int) and wanted < -1):
        raise BadInputError(f"trainer.devices is {devices}; give how many GPUs, a list of their numbers, or -1 for all")
    there = torch.cuda.device_count()
    if there == 0:
        return
    if isinstance(wanted, int) and wanted > there:
        raise BadInputError(f"trainer.devices is {devices}, and {there} GPUs are seen here; give at most {there}, or -1 for all")
    if isinstance(wanted, list) and (len(set(wanted)) < len(wanted) or not all(0 <= one < there for one in wanted)):
        raise BadInputError(f"trainer.devices is {devices}; give different numbers from 0 to {there - 1}")


def _device_numbers(devices: Any) -> int | list[int] | None:
    """How many, or which; None where it is neither."""
    try:
        if isinstance(devices, str):
            return [int(part) for part in devices.split(",") if part.strip()] if "," in devices else int(devices)
        return [int(one) for one in devices] if isinstance(devices, list | tuple) else int(devices)
    except ValueError:
        return None
