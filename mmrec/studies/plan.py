"""The studies: which runs each is made of."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmrec.commandline.configs import SUFFIXES, config_layers, shipped_config_folder
from mmrec.commandline.errors import BadInputError
from mmrec.nearest import did_you_mean, nearest_name
from mmrec.studies.runs import Run, assemble

DEFAULT = "mm-rec"  # the arm without an overlay
BASELINES = {"transformer++": "baselines/transformer", "gated-deltanet": "baselines/gated-deltanet", "gla": "baselines/gla"}
SIZES = ("35m", "120m")
PROTOCOL_ARMS = (DEFAULT, "uboo_mse", "uboo_normalized")


def overlays(prefix: str = "") -> tuple[str, ...]:
    """Names of the shipped overlays of `ablation/` that begin with `prefix`."""
    return tuple(sorted(path.stem for path in (shipped_config_folder() / "ablation").glob(f"{prefix}*.yaml")))


@dataclass(frozen=True, kw_only=True)
class Study:
    """A set of runs: every arm with every learning rate and every seed.

    Attributes:
        name: as rows have it.
        what: one line for the help.
        arms: `mm-rec`, a baseline, or overlays of `ablation/` by name or path, several joined by `+`.
        size: which of the two networks.
        label: what rows call the size; None: `size`.
        steps: optimiser steps; None: as many as make `tokens_m` million tokens.
        tokens_m: see above.
        batch: sequences of a micro-batch, and micro-batches of a step.
        learning_rates: empty: what the config and the arm's overlay say.
        seeds: of weights and data order.
        validations: how often the loss on held-out text is taken on the way.
        final_batches: of each held-out source at the end; None: all.
        options: of the configs, by their dotted names; an arm's overlay comes after them.
        baseline_options: the same, of a baseline.
    """

    name: str
    what: str
    arms: tuple[str, ...]
    size: str = "35m"
    label: str | None = None
    steps: int | None = None
    tokens_m: float = 20.0
    batch: tuple[int, int] = (8, 1)
    learning_rates: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0,)
    validations: int = 20
    final_batches: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    baseline_options: dict[str, Any] = field(default_factory=dict)

    def runs(self) -> list[Run]:
        """All runs, seeds last: an interrupted study has whole comparisons."""
        names: dict[str, str] = {}
        for arm in self.arms:
            other = names.setdefault(variant_of(arm) or arm, arm)
            if other != arm:
                raise BadInputError(f"--arms: {other} and {arm} would both be called {variant_of(arm)}; rename one")
        rates: tuple[float | None, ...] = self.learning_rates or (None,)
        return [self._run(arm, rate, seed) for seed in self.seeds for arm in dict.fromkeys(self.arms) for rate in rates]

    def _run(self, arm: str, rate: float | None, seed: int) -> Run:
        parts: list[Any] = [f"study_{self.size}", self.options]
        parts += [f"{BASELINES[arm]}_{self.size}", self.baseline_options] if arm in BASELINES else overlays_of(arm)
        if rate is not None:
            parts.append({"model.learning_rate": rate})
        content = assemble(*parts)
        size, accumulate = self.batch
        content["data"]["init_args"]["batch_size"] = size
        trainer = content["trainer"]
        trainer["accumulate_grad_batches"] = accumulate
        tokens = size * accumulate * content["data"]["init_args"]["seq_len"]
        trainer["max_steps"] = self.steps if self.steps is not None else int(self.tokens_m * 1e6) // tokens
        if trainer["max_steps"] < 1:
            raise BadInputError(f"{self.tokens_m} M tokens are less than one step of {tokens:,}; give more with --tokens-m")
        return Run(
            study=self.name,
            variant=variant_of(arm),
            content=content,
            seed=seed,
            validations=self.validations,
            final_batches=self.final_batches,
            sizes=self.label or self.size,
        )


def overlays_of(arm: str) -> list[str]:
    """Configs that an arm lays over the network's own; none for the network as it is, nor for a baseline.

    Raises:
        BadInputError: an arm that nothing is known of, or an overlay of something else than the model.
    """
    if arm in BASELINES:
        return []
    found = [_overlay(name) for name in arm.split("+") if name != DEFAULT]
    for name in found:
        for layer in config_layers(name):
            if set(layer.content) != {"model"}:
                held = ", ".join(layer.content) or "nothing"
                raise BadInputError(f"{layer.path} holds {held}; an arm may change model: alone, the options change the rest")
    return found


def variant_of(arm: str) -> str | None:
    """An arm's name in the column `variant`: its overlays'; None for the network as it is, and for a baseline."""
    names = [Path(name).stem for name in arm.split("+") if name not in (DEFAULT, *BASELINES)]
    return "+".join(names) if arm not in BASELINES and names else None


def _overlay(name: str) -> str:
    short = name.removeprefix("ablation/")
    if short in overlays():
        return f"ablation/{short}"
    if Path(name).suffix in SUFFIXES and Path(name).is_file():
        return name
    known = (DEFAULT, *BASELINES, *overlays())
    hint = did_you_mean(nearest_name(short, known, cutoff=0.6)) or ";"
    raise BadInputError(f"no arm {name}{hint} give a YAML file, or one of {', '.join(known)}")


def studies() -> dict[str, Study]:
    """All studies by name, as `train_uboo_test` runs them where no option says otherwise."""
    uboo = overlays("uboo_")
    found = (
        Study(name="baseline", what="the network beside a Transformer++, 20 M tokens", arms=(DEFAULT, "transformer++"), seeds=(0, 1, 2)),
        Study(
            name="lr_grid",
            what="three learning rates for each network",
            arms=(DEFAULT, "transformer++"),
            learning_rates=(7.5e-4, 1.5e-3, 3e-3),
        ),
        Study(
            name="ablation",
            what="the network with one thing changed, by the overlays of configs/ablation",
            arms=(DEFAULT, *(name for name in overlays() if name not in uboo)),
        ),
        Study(name="uboo", what="UBÖO, one factor at a time, 20 M tokens", arms=(DEFAULT, *uboo)),
        Study(
            name="protocol",
            what="the founding document's: 10,000 steps of 8,192 tokens, off, mse and normalized",
            arms=PROTOCOL_ARMS,
            steps=10_000,
            batch=(4, 1),
            learning_rates=(3e-4,),
            seeds=(0, 1, 2),
            validations=50,
        ),
        Study(
            name="protocol",
            what="… and at its effective batch of 128 sequences: 381 steps",
            arms=PROTOCOL_ARMS,
            steps=381,
            batch=(16, 8),
            learning_rates=(3e-4,),
            seeds=(0, 1, 2),
        ),
        Study(
            name="finalist",
            what="the network beside a Transformer++ at 120 M, one pass of 98 M tokens",
            arms=(DEFAULT, "transformer++"),
            size="120m",
            tokens_m=98.14,
            seeds=(0, 1, 2),
        ),
    )
    # Both forms of the protocol are one study in the rows.
    return {study.name if study.batch[1] == 1 else f"{study.name}_128": study for study in found}


def quick(study: Study, folder: Path) -> Study:
    """A study on a CPU in half a minute: networks of three layers of 64, the built-in text, 60 steps, two seeds.

    Args:
        study: the study.
        folder: where the built-in text is kept.
    """
    sizes = {"vocab_size": 1024, "model_dim": 64, "num_layers": 3, "num_heads": 2, "ffn_dim": 128}
    data = {"source": "sample", "vocab_size": 1024, "seq_len": 128, "validation_batches": 2, "tokens_dir": None, "cache_dir": str(folder)}
    options = {
        **{f"model.network.{name}": size for name, size in sizes.items()},
        **{f"data.init_args.{name}": value for name, value in data.items()},
        "model.learning_rate": 3e-3,
        "model.warmup_steps": 5,
        "model.cuda_graph": False,
        "trainer.precision": "32-true",
    }
    return replace(
        study,
        label="quick",
        steps=60,
        batch=(4, 1),
        learning_rates=(),
        seeds=(0, 1),
        validations=6,
        final_batches=8,
        options=study.options | options,
        baseline_options={"model.compile_blocks": False} | {f"baseline.{name}": size for name, size in sizes.items()},
    )
