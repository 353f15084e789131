"""One run of a study: what is trained, and the row that comes of it."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmrec.baselines import BaselineConfig
from mmrec.commandline.configs import ConfigLayer, config_layers, merge
from mmrec.config import MMRecConfig, config_from_fields

Row = dict[str, Any]
# What tells a run's row from all others.
IDENTITY = (
    "study", "model", "variant", "size", "trained_on", "seq_len", "params_m", "batch_tokens", "steps", "lr", "seed",
    "uboo", "orthogonalize", "lambda_P", "gpu",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run.

    Attributes:
        study: the study it belongs to.
        variant: what it differs in, the name of an overlay; None for a network as its config has it.
        content: the merged config, as `fit` would read it; under `baseline` the fields of a BaselineConfig, where one is trained.
        seed: of weights and data order.
        validations: how often the loss on held-out text is taken on the way, on a part of it.
        final_batches: of each held-out source at the end; None: all.
        sizes: which of a study's sizes it has.
    """

    study: str
    variant: str | None
    content: Mapping[str, Any] = field(hash=False)
    seed: int
    validations: int = 20
    final_batches: int | None = None
    sizes: str = ""

    @property
    def is_baseline(self) -> bool:
        """Whether it is another network than MM-Rec that is trained."""
        return "baseline" in self.content

    @property
    def network(self) -> MMRecConfig | BaselineConfig:
        """The network's configuration."""
        if self.is_baseline:
            return BaselineConfig(**self.content["baseline"])
        return config_from_fields("model.network", self.content["model"].get("network", {}))

    @property
    def model(self) -> str:
        """The kind of network, as rows name it."""
        return str(self.content["baseline"]["kind"]) if self.is_baseline else "mm-rec"

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return int(self.content["trainer"]["max_steps"])

    @property
    def accumulate(self) -> int:
        """Micro-batches a step."""
        return int(self.content["trainer"].get("accumulate_grad_batches", 1))

    @property
    def batch_tokens(self) -> int:
        """Tokens of a step."""
        data = self.content["data"]["init_args"]
        return int(data["batch_size"]) * int(data["seq_len"]) * self.accumulate

    @property
    def trained_on(self) -> str:
        """The folder of tokens by its name, or what else the data is."""
        data = self.content["data"]["init_args"]
        return Path(data["tokens_dir"]).name if data.get("tokens_dir") else str(data.get("source", self.content["data"]["class_path"]))

    @property
    def title(self) -> str:
        """For a line on the screen."""
        parts = (self.study, self.model, self.variant or "", self.sizes, f"lr {self.learning_rate:g}", f"seed {self.seed}")
        return " ".join(filter(None, parts))

    @property
    def learning_rate(self) -> float:
        """AdamW's peak."""
        return float(self.content["model"]["learning_rate"])

    def description(self) -> Row:
        """The columns of the row that are known before it has run."""
        network = self.network
        row: Row = {
            "study": self.study,
            "model": self.model,
            "variant": self.variant,
            "size": self.sizes or None,
            "params_m": None,
            "trained_on": self.trained_on,
            "seq_len": int(self.content["data"]["init_args"]["seq_len"]),
            "tokens_m": round(self.steps * self.batch_tokens / 1e6, 3),
            "steps": self.steps,
            "batch_tokens": self.batch_tokens,
            "lr": self.learning_rate,
            "seed": self.seed,
            "uboo": None,
            "orthogonalize": None,
            "lambda_P": None,
        }
        if isinstance(network, MMRecConfig):
            row["uboo"] = network.planning_loss if network.use_uboo else "off"
            if network.use_uboo:
                row |= {"orthogonalize": network.orthogonalize, "lambda_P": network.lambda_P}
        return row


def assemble(*parts: str | Mapping[str, Any]) -> dict[str, Any]:
    """One content of configs by their names and of options by their dotted names, `{"model.learning_rate": 1e-3}`; later ones win."""
    layers: list[ConfigLayer] = []
    for part in parts:
        layers += config_layers(part) if isinstance(part, str) else [ConfigLayer(Path(), _nested(part))]
    return merge([ConfigLayer(layer.path, deepcopy(layer.content)) for layer in layers])


def _nested(options: Mapping[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for dotted, value in options.items():
        *path, last = dotted.split(".")
        place = content
        for name in path:
            place = place.setdefault(name, {})
        place[last] = value
    return content
