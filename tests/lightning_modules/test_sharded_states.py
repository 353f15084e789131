"""Whole tensors to shards and back, where rows do not divide evenly and where moments are of 8 bits."""

import pytest
import torch
from ranks import run_ranks
from support import same_tensors
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_modules.sharded_states import load_optimizer_state, load_weights, whole_optimizer_state, whole_weights

SHAPES = [(4, 3), (3, 5), (1,), (7,)]


def sharded(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> torch.nn.ParameterList:
    """Zeros over two ranks, the last of them whole on each."""
    mesh = init_device_mesh("cpu", (2,))
    tensors = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    parts = [distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in tensors[:-1]]
    return torch.nn.ParameterList([*map(torch.nn.Parameter, parts), torch.nn.Parameter(tensors[-1])])


def uneven_rows() -> None:
    dist.init_process_group("gloo")
    module = sharded(SHAPES)
    torch.manual_seed(1)
    weights = {str(index): torch.randn(shape) for index, shape in enumerate(SHAPES)}
    load_weights(module, weights)
    found = whole_weights(module)
    assert same_tensors(found, weights) if dist.get_rank() == 0 else found == {}

    # Two groups, in another order than the module's: states go with their parameters.
    first, second, third, whole = module
    optimizer = torch.optim.AdamW([{"params": [second, whole]}, {"params": [third, first]}])
    order = [SHAPES[1], SHAPES[3], SHAPES[2], SHAPES[0]]
    names = ("exp_avg", "exp_avg_sq")
    state = {index: {"step": torch.tensor(3.0)} | {name: torch.randn(shape) for name in names} for index, shape in enumerate(order)}
    load_optimizer_state(optimizer, {"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    assert optimizer.state[first]["exp_avg"].shape == first.shape
    again = whole_optimizer_state(optimizer)["state"]
    assert all(same_tensors(again[index], own) for index, own in state.items()) if dist.get_rank() == 0 else again == {}
    dist.destroy_process_group()


def moments_of_8_bits() -> None:
    dist.init_process_group("gloo")
    from torchao.optim.subclass_8bit import OptimState8bit

    from lightning_modules.lean_adamw import FusedAdamW8bit

    # Whole blocks of 256 in each shard, though of 33 and 32 rows; a block that reaches over the border; a parameter that is whole.
    shapes = [(65, 256), (6, 128), (32, 256)]
    optimizer = FusedAdamW8bit([{"params": list(sharded(shapes))}])
    torch.manual_seed(1)
    moments = [OptimState8bit.zeros(shape) for shape in shapes]
    for moment in moments:
        moment.copy_(torch.randn(moment.shape))
    state = {index: {"step": torch.tensor(2.0), "exp_avg": moment, "exp_avg_sq": moment} for index, moment in enumerate(moments)}
    load_optimizer_state(optimizer, {"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    again = whole_optimizer_state(optimizer)["state"]
    if dist.get_rank() == 0:
        for index in (0, 2):
            assert torch.equal(again[index]["exp_avg"].codes, moments[index].codes)
            assert torch.equal(again[index]["exp_avg"].scale, moments[index].scale)
        assert torch.equal(again[1]["exp_avg"], moments[1].dequantize())
    dist.destroy_process_group()


def test_rows_that_do_not_divide_evenly() -> None:
    assert run_ranks(uneven_rows, 2) == [0, 0]


def test_moments_of_8_bits_keep_their_codes_or_what_they_stand_for() -> None:
    pytest.importorskip("torchao")
    assert run_ranks(moments_of_8_bits, 2) == [0, 0]
