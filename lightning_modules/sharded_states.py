"""Weights and optimiser states in shards, to whole ones on rank 0 and back: a checkpoint is the same file however it was trained.

Not Lightning's way, which asks torch for both by the parameters' names: it counts parameters in the network's order where an optimiser
counts them group by group, so that moments of an unsharded run would be given to other weights, and before the first step it would have
the optimiser take one.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from callbacks.shards import local_part
from mmrec.ranks import gathered


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """A module's `state_dict` with whole tensors on the CPU, on rank 0; {} on all others. A collective, one tensor at a time."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    known: dict[int, Tensor | None] = {}
    found: dict[str, Any] = {}
    for name, value in module.state_dict().items():
        key = id(parameters.get(name, value))  # weights that are shared stay so
        if key not in known:
            known[key] = unsharded(value)
        found[name] = known[key]
    return found if dist.get_rank() == 0 else {}


def whole_optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """An optimiser's `state_dict` with whole tensors on the CPU, on rank 0; without states on all others. A collective.

    Moments are of 8 bits where they are so on all ranks: by the size of its shard torchao may have left one's as they were.
    """
    state = optimizer.state_dict()
    in_8_bit = {(index, name) for index, own in state["state"].items() for name, value in own.items() if is_8_bit(value)}
    common = set.intersection(*gathered(in_8_bit))
    whole = {
        index: {name: unsharded(value, (index, name) in common) for name, value in own.items()} for index, own in state["state"].items()
    }
    return {**state, "state": whole if dist.get_rank() == 0 else {}}


def unsharded(value: Any, in_8_bit: bool = False) -> Any:
    """A tensor of shards as a whole one on the CPU of rank 0, None on the others; anything else as it is."""
    if not isinstance(value, DTensor):
        return value
    local: Any = value.to_local()
    if in_8_bit:
        codes = _like(local.codes, value).full_tensor()
        whole = type(local)(codes, _scales(local, value, codes.numel()), local.qmap, local.signed)
    else:
        whole = _like(local.dequantize() if is_8_bit(value) else local, value).full_tensor()
    return whole.cpu() if dist.get_rank() == 0 else None


@torch.no_grad()
def load_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Take up whole weights, each rank its rows of them; all of the module's must be there, in their shapes."""
    targets = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())
    for name, target in targets.items():
        if isinstance(target, DTensor):
            target.to_local().copy_(_own_rows(weights[name], target))
        else:
            target.copy_(weights[name])


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Take up a whole state, as the `state_dict` of an optimiser of whole weights gives it; each rank its rows."""
    saved = [index for group in state["param_groups"] for index in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    owner = dict(zip(saved, parameters, strict=True))
    shards = {index: {name: _shard(value, owner[index]) for name, value in own.items()} for index, own in state["state"].items()}
    optimizer.load_state_dict({**state, "state": shards})


def is_8_bit(value: Any) -> bool:
    """Whether a moment, or this rank's part of it, is held in torchao's 8 bits: codes, and a scale for each so many of them."""
    local = local_part(value)
    return type(local).__name__ == "OptimState8bit"


def _like(local: Tensor, like: DTensor) -> DTensor:
    """This rank's rows as part of a tensor that is divided as `like` is."""
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def _rows(like: DTensor) -> tuple[int, int]:
    """How many rows a rank has, and this one's first; the last ranks may have fewer, or none, as `torch.chunk` divides them."""
    rows = -(-like.shape[0] // like.device_mesh.size())
    return rows, rows * like.device_mesh.get_local_rank()


def _own_rows(whole: Tensor, like: DTensor) -> Tensor:
    """This rank's rows of a whole tensor, on its device; a copy."""
    rows, start = _rows(like)
    return whole[start : start + rows].to(like.device, copy=True)


def _shard(value: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value.to(value.device, copy=True)  # a file may be mapped there
    local = _own_8_bit(value, parameter) if is_8_bit(value) else _own_rows(value, parameter)
    return _like(local, parameter)


def _own_8_bit(whole: Any, parameter: DTensor) -> Tensor:
    """This rank's rows of a moment of 8 bits; as the numbers they stand for, where blocks of one scale reach beyond them."""
    rows, start = _rows(parameter)
    row, block = whole.shape[1:].numel(), whole.block_size
    if rows * row % block:
        return _own_rows(whole.dequantize(), parameter)
    codes, scale = _own_rows(whole.codes, parameter), whole.scale[start * row // block : (start + rows) * row // block]
    return type(whole)(codes, scale.to(codes.device, copy=True), whole.qmap.to(codes.device), whole.signed)


def _scales(local: Any, value: DTensor, numbers: int) -> Tensor:
    """The whole tensor's scales; all ranks hold as many but the last ones, which are filled up on the way."""
    row, block = value.shape[1:].numel(), local.block_size
    most = _rows(value)[0] * row // block
    padded = local.scale.new_zeros(most)
    padded[: local.scale.numel()] = local.scale
    found = local.scale.new_empty(most * value.device_mesh.size())
    dist.all_gather_into_tensor(found, padded, value.device_mesh.get_group())
    return found[: numbers // block].clone()
