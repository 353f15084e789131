"""What a run's checkpoint says of its network, and the network for inference."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_modules.checks import check_checkpoint_shapes
from mmrec.config import MMRecConfig
from mmrec.files import read_checkpoint
from mmrec.model import MMRecModel
from mmrec.pretrained import assemble

_PREFIX = "network."  # where the network lies in the LightningModule


def read_run_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of `fit`, tensors mapped from the file and not read until used.

    Raises:
        FileNotFoundError, ValueError: see `read_checkpoint`; or no checkpoint of `fit`.
    """
    checkpoint = read_checkpoint(path, mmap=True)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(f"checkpoint {path} holds no state_dict: it was not written by `fit`")
    return checkpoint


def network_config(checkpoint: Mapping[str, Any], path: Path) -> MMRecConfig:
    """The network's configuration that the LightningModule stored.

    Raises:
        ValueError: none there, or one of another version.
    """
    fields = checkpoint.get("hyper_parameters", {}).get("network")
    if not isinstance(fields, dict):
        raise ValueError(f"checkpoint {path} does not say which network it holds; it was not written by `fit`")
    # UBÖO is training's alone, and forms of it have come and gone.
    needed = {name: value for name, value in fields.items() if not name.startswith("planning_")}
    try:
        return MMRecConfig(**{"embedding_scale": 1.0, **needed})  # there was none before it had a field
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint {path} is of another version of this code: {error}") from error


def require_fitting_checkpoint(path: Path, config: MMRecConfig) -> None:
    """Compare a checkpoint with a network on the meta device: before anything of it is built.

    Raises:
        ValueError: naming the first parameter that does not fit, or field that gives the parameters another meaning.
    """
    checkpoint = read_run_checkpoint(path)
    with torch.device("meta"):
        network = MMRecModel(config)
    check_checkpoint_shapes(checkpoint, nn.ModuleDict({"network": network}), config)


def load_network(path: Path, device: torch.device, dtype: torch.dtype | None = None) -> MMRecModel:
    """The network of a checkpoint for inference: evaluation mode, UBÖO's projections neither built nor read.

    Args:
        path: a checkpoint that `fit` wrote.
        device: where to put it.
        dtype: of the weights, but for those that stay in fp32; None: as in the checkpoint.

    Raises:
        ValueError: see `read_run_checkpoint` and `network_config`; or weights that do not fit the configuration.
    """
    checkpoint = read_run_checkpoint(path)
    config = network_config(checkpoint, path)
    fields = {**asdict(config), "use_uboo": False, "activation_checkpointing": False}
    inference = MMRecConfig(**fields)
    with torch.device("meta"):
        wanted = MMRecModel(inference).state_dict()
    weights = {name.removeprefix(_PREFIX): value for name, value in checkpoint["state_dict"].items() if name.startswith(_PREFIX)}
    # Copies: the file may go.
    kept = {name: weights[name].to(device, copy=True) for name in wanted if name in weights}
    return assemble(inference, kept, f"checkpoint {path}", dtype)
