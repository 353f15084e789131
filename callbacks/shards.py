"""What callbacks ask of weights and gradients that may lie in shards."""

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor in shards, perhaps nothing; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def largest(tensors: list[Tensor]) -> Tensor:
    """The largest magnitude in what this rank holds of the tensors, 0-dim fp32; NaN and infinities come through."""
    held = [part for tensor in tensors if (part := local_part(tensor.detach())).numel()]  # an empty shard has no largest
    return torch.stack([norm.float() for norm in torch._foreach_norm(held, float("inf"))]).amax()


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are finite, on all ranks that hold a part of it: a collective for one in shards."""
    part = local_part(tensor.detach())
    finite = torch.linalg.vector_norm(part, float("inf")).isfinite() if part.numel() else torch.ones((), device=part.device)
    if isinstance(tensor, DTensor):
        finite = finite.int()
        dist.all_reduce(finite, dist.ReduceOp.MIN, group=tensor.device_mesh.get_group())
    return bool(finite)
