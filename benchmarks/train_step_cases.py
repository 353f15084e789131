"""What `train_step.py` can measure: which network, which batch, how trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from inspect import signature
from typing import Any

import yaml

from mmrec.commandline.configs import config_layers, merge
from mmrec.config import MMRecConfig
from mmrec.nearest import did_you_mean, nearest_name

KINDS = ("step", "llama", "planning")
# Arguments of the Trainer: nothing beside the clock.
SILENT: dict[str, Any] = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1000,
}  # fmt: skip
# Arguments of the Trainer that the scripts give themselves, and what changes them; "" where nothing does.
OWN = dict.fromkeys((*SILENT, "accelerator", "callbacks", "num_nodes"), "") | {
    "accumulate_grad_batches": "its cases have their own", "devices": "benchmarks/scaling.py measures several", "max_steps": "give --steps",
    "strategy": "benchmarks/scaling.py measures them",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement.

    Attributes:
        name: what `--only` calls it.
        what: in a line, for `--list`.
        config: a shipped config; its trainer, model and network fields are taken, but for those given here.
        kind: `step`, a training step of ours; `llama`, one of Hugging Face's; `planning`, bytes and times of UBÖO off and on.
        batches: sizes B to try, the largest first; the first that fits the memory is measured.
        seq_len: T.
        accumulate: micro-batches of a step.
        model: arguments of the training module.
        network: fields of the network.
        trainer: arguments of the Trainer.
        cold: empty caches, so that `first_step_s` is that of a first run.
        warmup, steps: steps before the clock, and under it.
    """

    name: str
    what: str
    config: str = "h100_370m"
    kind: str = "step"
    batches: tuple[int, ...] = (8,)
    seq_len: int = 2048
    accumulate: int = 1
    model: dict[str, Any] = field(default_factory=dict)
    network: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    cold: bool = False
    warmup: int = 8
    steps: int = 12

    def settings(self) -> dict[str, Any]:
        """The config's content, merged: `trainer`, `model` and, in it, `network`, with this case's own fields on top."""
        content = merge(config_layers(self.config))
        model = dict(content.get("model") or {})
        network = {**(model.pop("network", None) or {}), **self.network}
        shipped = content.get("trainer") or {}
        trainer = {name: shipped[name] for name in ("precision", "gradient_clip_val") if name in shipped}
        return {"trainer": trainer | self.trainer, "model": model | self.model, "network": network}

    def changed(self, settings: Sequence[str]) -> "Case":
        """This case with `network.NAME=VALUE`, `model.NAME=VALUE` or `trainer.NAME=VALUE`, which its name then says.

        Raises:
            ValueError: for a setting of another form.
        """
        case = self
        for setting in settings:
            key, equals, value = setting.partition("=")
            key = key.removeprefix("model.") if key.startswith("model.network.") else key  # as `fit` spells it
            group, _, name = key.partition(".")
            if not (equals and name and group in ("network", "model", "trainer")):
                raise ValueError(f"{setting} is no setting; give network.NAME=VALUE, model.NAME=VALUE or trainer.NAME=VALUE")
            changed = getattr(case, group) | {name: yaml.safe_load(value)}
            case = replace(case, name=f"{case.name} {group}.{name}={value}", **{group: changed})
        return case


def check_settings(case: Case, settings: Sequence[str], own: Mapping[str, str] = OWN) -> None:
    """Raise where one of `settings`, which `case` was changed by, names nothing, or the network cannot be built with them.

    Args:
        case: with the settings in it.
        settings: as they were given.
        own: arguments of the Trainer that are no setting, as the script gives them itself, and what changes them.

    Raises:
        ValueError: in one line, with the nearest name.
    """
    if not settings:
        return
    from lightning.pytorch import Trainer

    from lightning_modules import MMRecLightningModule

    known = {
        "network": {known.name for known in fields(MMRecConfig)},
        "model": set(signature(MMRecLightningModule).parameters) - {"network"},
        "trainer": set(signature(Trainer).parameters),
    }
    for group, names in known.items():
        for name in getattr(case, group):
            if name not in names:
                raise ValueError(f"no {group}.{name}{did_you_mean(f'{group}.{nearest_name(name, names)}')}")
    for name in own.keys() & case.trainer:
        raise ValueError(f"trainer.{name} is the script's own; {own[name] or 'leave it out'}")
    MMRecConfig(**case.settings()["network"])


GRAPH, EAGER = {"cuda_graph": True}, {"cuda_graph": False}
COMPILED = EAGER | {"compile_blocks": True}
OFF, ON = {"use_uboo": False}, {"use_uboo": True}
RECOMPUTED = OFF | {"activation_checkpointing": "selective"}
_370M = Case(name="370m", what="368 M, UBÖO off, one CUDA graph", model=GRAPH, network=OFF)
_1B3 = Case(
    name="1b3",
    what="1.27 B, UBÖO off, nothing recomputed, the largest B that fits",
    config="h100_1b3",
    batches=(12, 8, 4),  # not 16: some 75 GiB of tensors leave the allocator too little of 79
    model=GRAPH,
    network=OFF | {"activation_checkpointing": False},
)
_7B = Case(
    name="7b_8bit",
    what="6.6 B, bf16-true, 8-bit AdamW, the cheap parts recomputed",
    config="h100_7b",
    batches=(4,),
    model={"optimizer": "adamw_8bit"},
    network=RECOMPUTED,
    trainer={"precision": "bf16-true"},
    warmup=4,
    steps=8,
)
_PLANNING = replace(
    _7B,
    name="7b_planning",
    what="UBÖO off and on at 7B: bytes and times of 2 and 6 layers, from them 24",
    kind="planning",
    model={},
    network={"activation_checkpointing": False},
)
_TINY = Case(
    name="tiny",
    what="a network for a CPU, to try the script",
    config="cpu_tiny",
    batches=(2,),
    seq_len=64,
    warmup=2,
    steps=3,
    trainer={"precision": "32-true"},
)

CASES = {
    case.name: case
    for case in (
        _370M,
        replace(_370M, name="370m_eager", what="368 M, UBÖO off, neither graph nor compiler", model=EAGER),
        replace(_370M, name="370m_compiled", what="368 M, UBÖO off, compiled blocks, no graph", model=COMPILED),
        replace(_370M, name="370m_uboo", what="410 M, UBÖO on", network=ON),
        replace(_370M, name="370m_six", what="six projections instead of HEM's one", network=OFF | {"use_hem": False}),
        replace(_370M, name="370m_fp8", what="compiled, the large products in FP8", model=COMPILED | {"fp8": True}),
        replace(_370M, name="370m_recomputed", what="decays, addresses and gated activations recomputed", network=RECOMPUTED),
        replace(
            _370M,
            name="370m_b16",
            what="32,768 tokens a step as B 16 x T 2048",
            batches=(16,),
        ),
        replace(
            _370M,
            name="370m_long",
            what="32,768 tokens a step as B 1 x T 32768",
            batches=(1,),
            seq_len=32768,
        ),
        replace(_370M, name="370m_cold", what="the first step with empty caches", cold=True, warmup=2, steps=2),
        replace(_370M, name="llama", what="Hugging Face's Llama, 24 x 1024, 374 M, eager", kind="llama", model={}),
        replace(
            _370M, name="llama_long", what="Hugging Face's Llama at B 1 x T 32768", kind="llama", model={}, batches=(1,), seq_len=32768
        ),
        _1B3,
        replace(_1B3, name="1b3_eager", what="1.27 B, no graph", model=EAGER),
        replace(_1B3, name="1b3_recomputed", what="1.27 B as shipped: the cheap parts recomputed", network=OFF),
        replace(_1B3, name="1b3_fp8", what="the large products in FP8", model=COMPILED | {"fp8": True}),
        _7B,
        replace(
            _7B,
            name="7b_bf16",
            what="6.6 B, bf16-true, AdamW with bf16 moments",
            model={"optimizer": "adamw_bf16"},
        ),
        replace(_7B, name="7b_uboo", what="7.4 B: 7b_8bit with UBÖO on", network=_7B.network | ON),
        _PLANNING,
        replace(_PLANNING, name="7b_planning_compiled", what="7b_planning with compiled blocks", model=COMPILED),
        _TINY,
        replace(_TINY, name="tiny_planning", what="7b_planning's way, for a CPU", kind="planning", warmup=1, steps=2),
        replace(_TINY, name="tiny_llama", what="llama's way, for a CPU", kind="llama", warmup=1, steps=2),
    )
}
# What the table asks for; the rest by name.
DEFAULT = ("370m", "370m_eager", "370m_uboo", "370m_b16", "370m_long", "370m_cold", "1b3", "7b_8bit", "7b_bf16", "7b_planning", "llama")
