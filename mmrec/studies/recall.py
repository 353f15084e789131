"""How much is recalled, against how much is carried: multi-query associative recall by networks of several sizes of state."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmrec.baselines.config import BaselineConfig
from mmrec.baselines.state import NARROW, state_bytes
from mmrec.commandline.errors import BadInputError
from mmrec.config import MMRecConfig
from mmrec.core import memory
from mmrec.core.cross_entropy import IGNORED_LABEL
from mmrec.measuring.machine import device, machine
from mmrec.studies.plan import BASELINES, DEFAULT, overlays_of, variant_of
from mmrec.studies.runs import Row, Run, assemble
from mmrec.studies.training import fit

STUDY = "recall"
# What tells a row from all others.
IDENTITY = (
    "study", "model", "variant", "model_dim", "num_heads", "num_layers", "initializer_range", "seq_len", "num_pairs", "train_pairs",
    "vocab_size", "steps", "batch_tokens", "lr", "seed", "gpu",
)  # fmt: skip


_SHARED = ("vocab_size", "num_layers", "ffn_dim", "initializer_range", "loss_chunk_size")  # fields that baselines have too


@dataclass(frozen=True, kw_only=True)
class RecallStudy:
    """Every arm with every width, width of a head, learning rate and seed.

    Attributes:
        arms: `mm-rec`, a baseline, or overlays by name or path, several joined by `+`; widths and heads are the study's in any case.
        widths: D.
        head_widths: D/H, of those that divide D; a Transformer's keys and values take the same bytes whatever the heads: it gets the first.
        learning_rates: each network is trained with each of them.
        seeds: of weights and examples.
        steps: optimiser steps, each of `batch` new examples.
        batch: examples a step.
        task: the task's sizes, as RecallDataModule's arguments.
        options: of the config, by their dotted names.
    """

    arms: tuple[str, ...] = (DEFAULT, "transformer++")
    widths: tuple[int, ...] = (64, 128, 256, 512)
    head_widths: tuple[int, ...] = (64, 128, 256)
    learning_rates: tuple[float, ...] = (3e-3, 1e-3, 1e-2)
    seeds: tuple[int, ...] = (0,)
    steps: int = 10_000
    batch: int = 64
    task: Mapping[str, int] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def runs(self) -> list[Run]:
        """All runs, networks innermost: what is there after an interruption is a whole curve, and workers compile different kernels.

        Raises:
            BadInputError: an unknown arm, a width that no head's divides.
        """
        return [
            self._run(arm, width, heads, rate, seed)
            for seed in self.seeds
            for rate in self.learning_rates
            for arm in self.arms
            for width in self.widths
            for heads in self._heads(arm, width)
        ]

    def _heads(self, arm: str, width: int) -> list[int]:
        fitting = [width // head for head in self.head_widths if width % head == 0]
        if not fitting:
            heads = ", ".join(map(str, self.head_widths))
            raise BadInputError(f"no head of {heads} channels divides a width of {width}; give others with --head-widths")
        return fitting[:1] if arm == "transformer++" else fitting

    def _run(self, arm: str, width: int, heads: int, rate: float, seed: int) -> Run:
        sizes = {"model_dim": width, "num_heads": heads}
        options = {
            "model.warmup_steps": self.steps // 10,
            "model.network.ffn_dim": MMRecConfig(model_dim=width, num_heads=heads).ffn_width,
            # With the 0.02 of wide networks a narrow Transformer finds nothing for thousands of steps; so it does at once (docs/log.md).
            "model.network.initializer_range": round(width**-0.5, 6),
            "trainer.max_steps": self.steps,
            "data.init_args.batch_size": self.batch,
            "data.init_args.train_examples": self.steps * self.batch,
            **{f"data.init_args.{name}": value for name, value in self.task.items()},
            **self.options,
        }
        swept = {"model.learning_rate": rate, **{f"model.network.{name}": value for name, value in sizes.items()}}
        content = assemble("recall/mqar", options, *overlays_of(arm), swept)
        network, task = content["model"]["network"], content["data"]["init_args"]
        network["vocab_size"], most = task["vocab_size"], task["num_pairs"]
        if "data.init_args.train_pairs" not in options:  # the config's are those of its own number of pairs
            task["train_pairs"] = [count for count in task["train_pairs"] if count < most] + [most]
        if arm in BASELINES:
            common = {name: network[name] for name in _SHARED if name in network}
            content["baseline"] = {"kind": arm, **common, **sizes, "embedding_scale": math.sqrt(width)}  # as MM-Rec's
        return Run(study=STUDY, variant=variant_of(arm), content=content, seed=seed, validations=1, sizes=f"D {width} H {heads}")


def description(run: Run) -> Row:
    """The columns of a run's row that are known before it has run."""
    config, task = run.network, run.content["data"]["init_args"]
    if isinstance(config, BaselineConfig):
        carried, heads = state_bytes(config, 1, task["seq_len"]), config.num_heads
    else:
        carried, heads = memory.state_bytes(config, 1, key_bytes=NARROW, length=task["seq_len"]), config.heads
    return {
        "study": run.study,
        "model": run.model,
        "variant": run.variant,
        "model_dim": config.model_dim,
        "num_heads": heads,
        "num_layers": config.num_layers,
        "initializer_range": config.initializer_range,
        "state_bytes": carried,
        "seq_len": task["seq_len"],
        "num_pairs": task["num_pairs"],
        "train_pairs": ", ".join(map(str, task["train_pairs"] or [task["num_pairs"]])),
        "vocab_size": task["vocab_size"],
        "steps": run.steps,
        "batch_tokens": run.batch_tokens,
        "lr": run.learning_rate,
        "seed": run.seed,
    }


def measure(run: Run) -> Row:
    """Train a run, and say what it recalls of the validation examples."""
    trained = fit(run)
    losses = trained.validate()
    with trained.evaluation() as network:
        recalled = accuracy(network, trained.data.val_dataloader())
    return {
        **description(run),
        **trained.parameters(),
        "accuracy": recalled,
        **losses,
        "peak_gib": trained.peak_gib,
        "seconds": round(trained.seconds, 1),
        **machine(device()),
    }


def accuracy(network: Any, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Share of the labelled positions at which the likeliest token is the label.

    Args:
        network: from token ids (B, T) to logits (B, T, vocab_size).
        batches: `input_ids` and `labels`, (B, T), −1 where there is no label.
    """
    where = device()
    right = torch.zeros((), dtype=torch.int64, device=where)
    labelled = torch.zeros_like(right)
    for batch in batches:
        ids, labels = batch["input_ids"].to(where), batch["labels"].to(where)
        right += (network(ids).argmax(-1) == labels).sum()  # no token is −1
        labelled += (labels != IGNORED_LABEL).sum()
    return int(right) / max(1, int(labelled))
