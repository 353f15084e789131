"""What each GPU holds and sends where several train together: with everything on each of them, and in shards."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mmrec.commandline.machine_needs import LEAST_ALLOCATOR
from mmrec.commandline.memory_estimate import Estimate, estimate, number_bytes
from mmrec.commandline.strategy_kinds import ALONE, ASKED_FOR_BY, DDP, FSDP2, TUNED, AskedStrategy, asked_strategy
from mmrec.config import MMRecConfig
from mmrec.model import MMRecModel

GATHERED_BLOCKS = 2  # at a time: the one that runs, and the one that comes next


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of one GPU under a strategy.

    Attributes:
        strategy: ALONE, DDP or FSDP2.
        gpus: that train together.
        weights, gradients, optimizer, activations: what is there all the time, and between forward and backward.
        gathered: whole weights and gradients of what runs, beside the shards; under DDP a second copy of the gradients where they do not
            lie in the buckets that they are sent in.
        sent: in an optimiser step, over the network.
    """

    strategy: str
    gpus: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int
    sent: int

    @property
    def total(self) -> int:
        """Bytes of all that is held."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.gathered

    def fits(self, memory: float) -> bool:
        """Whether a GPU of so many bytes holds it, the least that the allocator adds included."""
        return LEAST_ALLOCATOR * self.total <= memory


def asked_by(content: Mapping[str, Any], gpus: int) -> AskedStrategy:
    """What a config's `trainer.strategy` asks for on so many GPUs."""
    return asked_strategy((content.get("trainer") or {}).get("strategy"), gpus)


def plans(name: str, content: Mapping[str, Any], gpus: int) -> list[MemoryPlan]:
    """One GPU alone, and DDP and FSDP2 on several.

    Args:
        name: of the config.
        content: its merged content.
        gpus: that train together.
    """
    row = estimate(name, content, gpus)
    alone = MemoryPlan(
        strategy=ALONE,
        gpus=1,
        weights=row.weights,
        gradients=row.gradients,
        optimizer=row.optimizer,
        activations=row.activations,
        gathered=0,
        sent=0,
    )
    return [alone, _ddp(content, row, gpus), _fsdp2(content, row, gpus)] if gpus > 1 else [alone]


def _ddp(content: Mapping[str, Any], row: Estimate, gpus: int) -> MemoryPlan:
    asked = asked_by(content, gpus)
    options = asked.options if asked.kind == DDP else {"gradient_as_bucket_view": True}
    buckets = 0 if options.get("gradient_as_bucket_view", asked.name == TUNED) else row.gradients
    travelling = row.gradients // 2 if options.get("gradients") == "bf16" and row.precision != "bf16-true" else row.gradients
    return MemoryPlan(
        strategy=DDP,
        gpus=gpus,
        weights=row.weights,
        gradients=row.gradients,
        optimizer=row.optimizer,
        activations=row.activations,
        gathered=buckets,
        sent=2 * travelling * (gpus - 1) // gpus,  # a ring's reduce-scatter and all-gather
    )


def _fsdp2(content: Mapping[str, Any], row: Estimate, gpus: int) -> MemoryPlan:
    asked = asked_by(content, gpus)
    options = asked.options if asked.kind == FSDP2 else {}
    config = MMRecConfig(**((content.get("model") or {}).get("network") or {}))
    with torch.device("meta"):
        network = MMRecModel(config)
    blocks = [sum(p.numel() for p in block.parameters()) for block in network.blocks]
    around = row.parameters - sum(blocks)
    bytes_each = number_bytes(row.precision)
    at_once = GATHERED_BLOCKS * max(blocks) + around
    gathered = 2 * at_once * bytes_each  # weights, and gradients on their way
    if row.precision == "bf16-mixed":
        # Autocast's copies live until the backward has read them, but for blocks that are formed again.
        gathered += 2 * (at_once if config.activation_checkpointing is True else row.parameters)
    micro_batches = int((content.get("trainer") or {}).get("accumulate_grad_batches", 1))
    whole_gradients = not options.get("reduce_every_micro_batch", True) and micro_batches > 1
    if whole_gradients:
        gathered += row.gradients
    gathers = (2 * sum(blocks) + around) * bytes_each  # before the forward and before the backward
    reduced = row.gradients * {"bf16": 2, "fp32": 4}.get(options.get("gradients", "full"), bytes_each) // bytes_each
    each_step = micro_batches * gathers + (1 if whole_gradients else micro_batches) * reduced
    return MemoryPlan(
        strategy=FSDP2,
        gpus=gpus,
        weights=-(-row.parameters * bytes_each // gpus),
        gradients=-(-row.gradients // gpus),
        optimizer=-(-row.optimizer // gpus),
        activations=row.activations,
        gathered=gathered,
        sent=each_step * (gpus - 1) // gpus,
    )


def advice(found: list[MemoryPlan], used: str, memory: float) -> str:
    """A sentence: which strategy to take on these GPUs. The one that sends least and fits."""
    several = [plan for plan in found if plan.gpus > 1] or found
    fitting = [plan for plan in several if plan.fits(memory)]
    if not fitting:
        least = min(several, key=lambda plan: plan.total)
        return (
            f"Nothing fits: {least.strategy} comes nearest with {least.total / 1e9:.1f} GB. Lower data.batch_size, set "
            "model.network.activation_checkpointing to true, or take more GPUs with FSDP2."
        )
    best = min(fitting, key=lambda plan: plan.sent)
    if best.strategy == used:
        return "It fits, and nothing that fits sends less: keep it."
    why = "it fits, and sends less" if best.sent <= min(plan.sent for plan in several) else "it is the one that fits"
    return f"Take {best.strategy} ({ASKED_FOR_BY[best.strategy]}): {why}."
