"""What callbacks ask of tensors in shards, some of which are empty."""

import torch
from ranks import run_ranks
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from callbacks.shards import is_finite, largest, local_part


def test_plain_tensors() -> None:
    tensors = [torch.tensor([1.0, -3.0]), torch.zeros(2, 0), torch.tensor([2.0], dtype=torch.bfloat16)]
    assert largest(tensors) == 3
    assert largest([*tensors, torch.tensor([float("nan")])]).isnan()
    assert all(is_finite(tensor) for tensor in tensors)
    assert not is_finite(torch.tensor([1.0, float("-inf")]))
    assert local_part(tensors[0]) is tensors[0]


def on_a_rank() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    one_row = distribute_tensor(torch.tensor([[5.0, -7.0]]), mesh, [Shard(0)])  # rank 1 has nothing of it
    rows = distribute_tensor(torch.tensor([[1.0], [2.0], [float("inf")]]), mesh, [Shard(0)])  # the last is rank 1's
    assert local_part(one_row).numel() == (2 if dist.get_rank() == 0 else 0)
    assert is_finite(one_row)
    assert not is_finite(rows)  # on rank 0 too
    assert largest([one_row, rows]) == (7 if dist.get_rank() == 0 else float("inf"))
    dist.destroy_process_group()


def test_tensors_in_shards() -> None:
    assert run_ranks(on_a_rank, 2) == [0, 0]
