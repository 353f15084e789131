"""Checks of what training is given: batches, vocabularies, checkpoints. Each fault is one line that names it and the remedy."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.optimizers import OPTIMIZERS
from mmrec.baselines import BaselineConfig
from mmrec.config import MMRecConfig


def check_hyperparameters(hparams: Mapping[str, Any]) -> None:
    """Raise ValueError for the first of the module's hyperparameters that cannot be meant."""
    infinity = float("inf")
    betas, decay_steps, lambda_P_final = hparams["betas"], hparams["decay_steps"], hparams["lambda_P_final"]
    fine = {
        "learning_rate": (0 < hparams["learning_rate"] < infinity, "a finite number above 0"),
        "min_learning_rate_ratio": (0 <= hparams["min_learning_rate_ratio"] <= 1, "a number from 0 to 1"),
        "warmup_steps": (hparams["warmup_steps"] >= 0, "0 or more steps"),
        "decay_steps": (decay_steps is None or decay_steps >= 1, "at least 1 step, or null for trainer.max_steps"),
        "weight_decay": (0 <= hparams["weight_decay"] < infinity, "a finite number of at least 0"),
        "betas": (len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers from 0 to below 1"),
        "eps": (0 < hparams["eps"] < infinity, "a finite number above 0"),
        "lambda_P_final": (lambda_P_final is None or 0 <= lambda_P_final < infinity, "a finite number of at least 0"),
        "lambda_P_anneal_steps": (hparams["lambda_P_anneal_steps"] >= 0, "0 or more steps"),
        "optimizer": (hparams["optimizer"] in OPTIMIZERS, "one of " + ", ".join(OPTIMIZERS)),
    }
    for name, (is_fine, remedy) in fine.items():
        if not is_fine:
            raise ValueError(f"model.{name} is {hparams[name]}; give {remedy}")


def check_batch_form(batch: Any) -> None:
    """Raise ValueError unless `batch` has integer `input_ids` and `labels` of one shape (B, T), with B and T at least 1.

    Looks at names, shapes and dtypes only: nothing waits for the device.
    """
    if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= batch.keys():
        found = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"a batch needs input_ids and labels, found {found}; correct the data module")
    ids, labels = batch["input_ids"], batch["labels"]
    if ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(f"input_ids have the shape {tuple(ids.shape)}; a batch is (B, T) with at least one token")
    if labels.shape != ids.shape:
        raise ValueError(f"labels have the shape {tuple(labels.shape)}, input_ids {tuple(ids.shape)}; they must agree")
    if ids.dtype != torch.int64 or labels.dtype != torch.int64:
        raise ValueError(f"input_ids are {ids.dtype} and labels {labels.dtype}; both must be torch.int64")


def check_token_range(batch: Mapping[str, Tensor], vocab_size: int) -> None:
    """Raise ValueError where an id lies outside the vocabulary. Waits for the device.

    `input_ids` must lie in 0 … vocab_size − 1, `labels` in −1 … vocab_size − 1.
    """
    for name, lowest in (("input_ids", 0), ("labels", -1)):
        low, high = (int(bound) for bound in torch.aminmax(batch[name]))
        if low < lowest or high >= vocab_size:
            culprit = low if low < lowest else high
            raise ValueError(
                f"token id {culprit} in {name} is out of range: the network knows {lowest} … {vocab_size - 1}; "
                "set model.network.vocab_size to the tokenizer's size"
            )


def check_vocabulary(data_vocab_size: int | None, vocab_size: int) -> None:
    """Raise ValueError where the data's vocabulary is not the network's; None (unknown) passes."""
    if data_vocab_size is not None and data_vocab_size != vocab_size:
        raise ValueError(
            f"the tokenizer has {data_vocab_size} tokens but the network {vocab_size}; set model.network.vocab_size={data_vocab_size}"
        )


def check_checkpoint_shapes(checkpoint: Mapping[str, Any], module: nn.Module, config: MMRecConfig | BaselineConfig) -> None:
    """Raise ValueError where a checkpoint's parameters do not fit, naming the first that does not, or would mean something else.

    Args:
        checkpoint: what Lightning loaded, with `state_dict` and, from this project, `hyper_parameters["network"]`.
        module: the module about to take the parameters.
        config: the network's; fields that differ from the checkpoint's become the remedy.
    """
    theirs = checkpoint.get("hyper_parameters", {}).get("network", {})
    saved, own = checkpoint["state_dict"], module.state_dict()
    for name in [*own, *(name for name in saved if name not in own)]:
        if name not in saved:
            fault = f"{name} is not in it"
        elif name not in own:
            fault = f"{name} is unknown to this network"
        elif saved[name].shape != own[name].shape:
            fault = f"{name} is {tuple(saved[name].shape)} there and {tuple(own[name].shape)} here"
        else:
            continue
        raise ValueError(f"the checkpoint is of another network: {fault}; {_remedy(theirs, config)}")
    if not theirs:
        return
    trained = _config_of(theirs, config)
    meant = _beyond_shapes(trained)
    for name, value in _beyond_shapes(config).items():
        if meant.get(name, value) != value:
            there, here = (_written(getattr(one, name)) for one in (trained, config))
            fault = f"{name} is {there} there and {here} here; set model.network.{name}={there}"
            raise ValueError(f"the checkpoint is of another network: {fault}")


def _config_of(theirs: Mapping[str, Any], own: MMRecConfig | BaselineConfig) -> MMRecConfig | BaselineConfig:
    """What a checkpoint was trained with. What an older one does not say was as the default is; but the embedding was not scaled.

    Raises:
        ValueError: a form of training that is gone.
    """
    planned = isinstance(own, MMRecConfig) and own.use_uboo
    known = {field.name for field in fields(own) if planned or not field.name.startswith("planning_")}
    if planned and theirs.get("planning_horizon", 1) != 1:
        fault = f"it was trained with planning_horizon={theirs['planning_horizon']}, which is gone"
        raise ValueError(f"the checkpoint is of another version of this code: {fault}; set model.network.use_uboo=false")
    try:
        return type(own)(**{"embedding_scale": 1.0} | {name: value for name, value in theirs.items() if name in known})
    except ValueError as error:
        raise ValueError(f"the checkpoint is of another version of this code: {error}") from error


def _beyond_shapes(config: MMRecConfig | BaselineConfig) -> dict[str, Any]:
    """By name, the fields that say what parameters mean and that no shape shows, with what stands for a default filled in."""
    if isinstance(config, BaselineConfig):
        return {"embedding_scale": config.embedding_scale, "num_heads": config.num_heads, "norm_eps": config.norm_eps}
    found: dict[str, Any] = {"embedding_scale": config.input_scale, "num_heads": config.heads}
    found |= {name: getattr(config, name) for name in ("norm_eps", "state_gate", "tie_embeddings")}
    if config.num_windows:
        found["window"] = config.window  # a convolution's width is a shape
    if config.use_uboo:
        found["planning_loss"] = config.planning_loss
    return found


def _written(value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _remedy(theirs: Mapping[str, Any], config: MMRecConfig | BaselineConfig) -> str:
    differing = {name: theirs[name] for name, value in asdict(config).items() if name in theirs and theirs[name] != value}
    if not differing:
        return "use the configuration it was trained with"
    return "it was trained with " + ", ".join(f"model.network.{name}={value}" for name, value in differing.items())
