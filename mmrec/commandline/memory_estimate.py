"""How much memory and how many tokens a config asks for, from its sizes alone; nothing is allocated."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch

from mmrec.commandline.errors import BadInputError
from mmrec.config import MMRecConfig
from mmrec.model import MMRecModel

_LOGIT = 8  # bytes that exist at a time for each logit of a chunk


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a config needs; bytes are for one GPU that holds everything (`memory_plan` knows of several).

    Attributes:
        name: the config's name.
        shape: layers × width.
        parameters: all, and `parameters_inference` without UBÖO's projections.
        weights, gradients, optimizer: bytes, exact but for the few parameters that stay in fp32; frozen ones have weights alone.
        activations: bytes, an estimate.
        tokens_per_step, tokens: that one GPU reads in an optimiser step, and in the whole run; None where the run has no end.
    """

    name: str
    shape: str
    precision: str
    parameters: int
    parameters_inference: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    tokens_per_step: int
    tokens: int | None

    @property
    def total(self) -> int:
        """Bytes of all four."""
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def checkpoint(self) -> int:
        """Bytes of one: weights without autocast's copies, and moments."""
        return self.parameters * number_bytes(self.precision) + self.optimizer


def estimate(name: str, content: Mapping[str, Any], devices: int = 1) -> Estimate:
    """Estimate a config's needs.

    Args:
        name: shown in the table.
        content: a config's merged content, as read from YAML.
        devices: GPUs; the tokens of the run are multiplied by it.

    Raises:
        ValueError: a network that cannot be built.
    """
    trainer, data = _group(content, "trainer"), content.get("data")
    data = _group(data, "init_args") if isinstance(data, Mapping) else {}  # else the name of a class, with its own sizes
    config = MMRecConfig(**_group(_group(content, "model"), "network"))
    with torch.device("meta"):
        network = MMRecModel(config)
    parameters = network.num_parameters()
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    precision = str(trainer.get("precision", "32-true"))
    bytes_each = number_bytes(precision)
    # Autocast keeps a bf16 copy of every weight from its first use in a step to the end of it.
    casts = 2 if precision == "bf16-mixed" else 0
    batch, seq_len = int(data.get("batch_size", 8)), int(data.get("seq_len", 2048))
    tokens_per_step = batch * seq_len * int(trainer.get("accumulate_grad_batches", 1)) * devices
    steps = int(trainer.get("max_steps", -1))
    return Estimate(
        name=name,
        shape=f"{config.num_layers} × {config.model_dim}",
        precision=precision,
        parameters=parameters,
        parameters_inference=network.num_parameters(training_only=False),
        weights=parameters * (bytes_each + casts),
        gradients=trained * bytes_each,
        optimizer=round(trained * moment_bytes(str((content.get("model") or {}).get("optimizer", "adamw")), bytes_each)),
        activations=_activations(config, batch * seq_len, bf16=precision.startswith("bf16")),
        tokens_per_step=tokens_per_step,
        tokens=steps * tokens_per_step if steps > 0 else None,
    )


@contextmanager
def errors_of(name: str, content: Mapping[str, Any]) -> Iterator[None]:
    """Refuse an overlay, and say of which config an error within is."""
    try:
        check_sizes(name, content)
        yield
    except BadInputError:
        raise
    except (TypeError, AttributeError, ValueError) as error:  # a key that the network does not know, a group that is no mapping
        raise BadInputError(f"config {name}: {error}") from error


def check_sizes(name: str, content: Mapping[str, Any]) -> None:
    """Raise where a config is an overlay: what it leaves out is not the default network's, but of the config that it changes.

    Args:
        name: of the config.
        content: its merged content.

    Raises:
        BadInputError: no size of a network is given, or the network is a baseline's.
    """
    if "baseline" in content:
        raise BadInputError(
            f"config {name} is an overlay of a baseline, whose memory is not estimated; studies train it on top of study_35m or "
            f"study_120m: python -m mmrec.scripts.train_uboo_test --arms {_group(content, 'baseline').get('kind', '')}"
        )
    network = _group(_group(content, "model"), "network")
    misspelt = network.keys() - {field.name for field in fields(MMRecConfig)}  # which the network names better
    if not misspelt and not network.keys() & {"model_dim", "num_layers"}:
        raise BadInputError(
            f"config {name} gives no model.network.model_dim or num_layers: it is an overlay, in fit given after the config that it "
            f"changes (--config study_35m --config {name}); for both together give a file of `base: [study_35m, {name}]`, or say the sizes"
        )


def _group(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    group = content.get(key) or {}
    if not isinstance(group, Mapping):
        raise ValueError(f"{key}: expected a mapping of keys to values, got {group!r}")
    return group


def number_bytes(precision: str) -> int:
    """Of a weight, a gradient, and a moment that is held as they are."""
    return 2 if precision == "bf16-true" else 4


def moment_bytes(optimizer: str, bytes_each: int) -> float:
    """Bytes a parameter of both moments; in 8 bits with an fp32 scale for each 256, but for a network's few small tensors."""
    return 2 * (1 + 4 / 256) if optimizer == "adamw_8bit" else 2 * bytes_each


def _activations(config: MMRecConfig, tokens: int, bf16: bool) -> int:
    """Bytes kept between forward and backward, and those of one chunk of logits and what is made of them."""
    number = 2 if bf16 else 4
    inputs = config.model_dim * number
    layers = [
        _block(config, number, config.has_window(index)) + config.has_planning(index) * _planning(config, number)
        for index in range(config.num_layers)
    ]
    # Blocks that are formed again are there one at a time.
    kept = config.num_layers * inputs + max(layers) if config.activation_checkpointing is True else sum(layers)
    return tokens * kept + min(tokens, config.loss_chunk_size) * config.vocab_size * _LOGIT


def _block(config: MMRecConfig, number: int, has_window: bool) -> int:
    """Bytes a token that a layer keeps for its backward, in numbers of so many bytes, counted from what its functions save.

    UBÖO's come on top; what a head has one number of, not one a channel, is left out.
    """
    dim, ffn = config.model_dim, config.ffn_width
    operators_apart = not config.state_gate  # each is differentiated on its own and keeps its inputs
    hidden = config.dpg_rank if config.use_dpg else 2 * (dim // 4)
    logits = dim if config.use_dpg else 2 * dim
    # Stream and norm twice, six projections, the decay's logits and hidden layers, h, r and gated read-out; gate and up.
    numbers = 13 * dim + logits + hidden + 2 * ffn
    wide = 10 * dim if operators_apart else 0  # fp32 decays, their logs and states, in place of four of these
    if operators_apart:
        numbers += (0 if config.use_dpg else hidden) - 4 * dim  # GELU keeps its input too, DPG's ReLU does not
    selective = config.activation_checkpointing == "selective"
    if not selective:
        numbers += ffn  # the product of gate and up, which selective forms again
    if operators_apart or not selective:
        numbers += 2 * dim  # two addresses
        if has_window:
            numbers += 2 * dim if config.window_conv > 1 else 0  # q and k convolved; without that they are the projections
        elif number == 2:
            numbers += 2 * dim  # the memories between chunks, for heads of 128; in fp32 they are not kept
    return numbers * number + wide * 4


def _planning(config: MMRecConfig, number: int) -> int:
    """Bytes a token that a layer's planning error keeps, in numbers of so many bytes; what its products read is there already."""
    if config.planning_loss == "mse":  # both products
        return config.planning_width * 2 * number
    # h one token earlier, in fp32 the product that is trained and its distance from the target.
    return config.model_dim * number + config.planning_width * 8
