"""A network whose weights, gradients and moments lie in shards, one a rank, by torch's `fully_shard` (FSDP2)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

FORWARD_METHODS = ("loss", "hidden_states")  # what is called of a network beside itself
BLOCK_METHODS = ("observed",)


def shard_network(network: Any, mesh: DeviceMesh, reduce_dtype: torch.dtype | None = None) -> None:
    """Shard each block, and what lies around them (embedding, last norm, head) as a group of its own; in place.

    A block's weights are gathered before its forward and again before its backward, and forgotten after each; the rest stays gathered
    between the two, as the backward begins where the forward ends. Weights travel and multiply in their own dtype, and autocast narrows
    them where it would anyway: a policy that cast them on the way would halve what fp32 weights send, but round gates, norms and time
    constants, which are read as they are.

    torch shards a group of weights in one dtype. The few wider ones (`wide_parameters`) stay whole on every rank: at 6.6 B they are 4 M,
    16 MB. Their gradients are the strategy's to average.

    Args:
        network: MM-Rec or a baseline, cast to the dtypes that it trains in.
        mesh: of one dimension, all ranks.
        reduce_dtype: in what gradients are summed over the ranks; None: in their own.
    """
    policy, whole = MixedPrecisionPolicy(reduce_dtype=reduce_dtype), set(wide_parameters(network))
    for block in network.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=whole)
        _register(block, BLOCK_METHODS)
    fully_shard(network, mesh=mesh, mp_policy=policy, ignored_params=whole)
    _register(network, FORWARD_METHODS)


def check_shardable(hparams: Mapping[str, Any]) -> None:
    """Raise ValueError for the first of the training module's hyperparameters that cannot be meant with shards."""
    if hparams["cuda_graph"]:
        raise ValueError("model.cuda_graph: weights in shards fit no CUDA graph; set it to false with FSDP2Strategy")


def configure(module: Any) -> None:
    """Shard a training module's network where its Trainer's strategy does so; nothing where each rank holds all of it.

    Raises:
        ValueError: for a strategy that would have divided the network otherwise: it would train without summing gradients.
    """
    if module._trainer is None:  # made from a checkpoint
        return
    strategy = module.trainer.strategy
    if hasattr(strategy, "shard"):
        strategy.shard(module)
    elif isinstance(strategy, ParallelStrategy) and not isinstance(strategy, DDPStrategy):
        name = type(strategy).__name__
        raise ValueError(f"trainer.strategy: {name} does not fit this module; give fsdp2, or ddp")


def check_gradient_curves(sharded: bool) -> None:
    """Raise ValueError where the two losses' gradients are to be compared, which are made of whole weights, and these lie in shards."""
    if sharded:
        raise ValueError(
            "auxiliary_curves.gradients_every_n_steps: gradients of weights in shards cannot be compared; set it to 0 with FSDP2Strategy"
        )


def is_sharded(network: nn.Module) -> bool:
    """Whether `shard_network` has been here."""
    return isinstance(network, FSDPModule)


def _register(module: nn.Module, names: tuple[str, ...]) -> None:
    for name in names:
        if hasattr(module, name):
            register_fsdp_forward_method(module, name)


def wide_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Where weights are of two dtypes (bf16-true leaves time constants in fp32) the wider ones, else none."""
    dtypes = {parameter.dtype for parameter in network.parameters()}
    widest = max(dtypes, key=lambda dtype: torch.finfo(dtype).bits)
    return [parameter for parameter in network.parameters() if len(dtypes) > 1 and parameter.dtype == widest]


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average whole gradients over the ranks, in place, in one collective."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    torch._foreach_copy_(
        gradients, [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in gradients]), gradients, strict=True)]
    )
