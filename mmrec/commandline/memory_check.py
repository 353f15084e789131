"""Whether the memory that a run needs at the very least can be there at all, said before it is asked for."""

import math
import os
from dataclasses import replace
from typing import Any

import torch
from jsonargparse import Namespace

from mmrec.commandline.errors import BadInputError
from mmrec.commandline.memory_estimate import Estimate, estimate
from mmrec.commandline.strategy_kinds import asked_strategy

_GIB = 1024**3
_MOST_LAYERS = 64  # that are laid out to be counted; beyond, one more layer is as large as those are in the mean
_ROUGH = 2.0  # activations are an estimate: only a run that would not fit with half of it is refused


def check_memory(config: Namespace) -> None:
    """Raise BadInputError where weights, gradients and optimiser, or twice too many activations, exceed a device's memory.

    Strategies that divide the weights among the ranks (FSDP and its like) are let pass.
    """
    asked = asked_strategy(config.trainer.strategy)
    if not asked.holds_all:
        return
    device, there = _memory(config.trainer.accelerator, asked.forks)
    try:
        needed = _estimate(config)
    except RuntimeError:  # sizes beyond 64 bits
        raise BadInputError("model.network: its sizes are beyond what any machine holds; give a smaller model_dim or num_layers") from None
    kept = needed.weights + needed.gradients + needed.optimizer
    parts = f"weights, gradients and optimiser take {kept / _GIB:,.1f} GiB, {device} {there / _GIB:,.1f} GiB"
    if kept > there:
        remedy = "give a smaller model.network.model_dim or num_layers, or a trainer.strategy that divides them"
        raise BadInputError(f"model.network does not fit: {parts}; {remedy}")
    if kept + needed.activations > _ROUGH * there:
        batch = f"data.batch_size × data.seq_len takes about {needed.activations / _GIB:,.0f} GiB"
        raise BadInputError(f"{batch}, {device} {there / _GIB:,.1f} GiB; give a smaller batch and trainer.accumulate_grad_batches")


def _memory(accelerator: Any, forks: bool) -> tuple[str, float]:
    """Words for and bytes of what the network will lie in; of the machine, where that is no CUDA device.

    Without end where ranks will be forked from this process: to ask a GPU initialises CUDA, and no forked process could use it then.
    """
    if accelerator != "cpu" and torch.cuda.device_count() > 0:
        return "the GPU's memory is", math.inf if forks else torch.cuda.get_device_properties(0).total_memory
    return "the host memory of this machine is", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _estimate(config: Namespace) -> Estimate:
    network = config.model.network.as_dict()
    given = getattr(config.data, "init_args", None) or Namespace()
    data = {name: given[name] for name in ("batch_size", "seq_len") if given.get(name) is not None}
    trainer = {"precision": config.trainer.precision or "32-true"}
    layers = network["num_layers"]
    model = {"optimizer": config.model.optimizer, "network": {**network, "num_layers": min(layers, _MOST_LAYERS)}}
    content = {"trainer": trainer, "data": {"init_args": data}, "model": model}
    needed = estimate("", content)
    if layers <= _MOST_LAYERS:
        return needed
    times = layers / _MOST_LAYERS
    sizes: dict[str, Any] = {name: int(getattr(needed, name) * times) for name in ("weights", "gradients", "optimizer", "activations")}
    return replace(needed, **sizes)
