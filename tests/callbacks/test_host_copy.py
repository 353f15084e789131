"""The copy of a state in host memory: the same values, shared where they were shared, apart from what it was copied from."""

from collections import OrderedDict
from typing import Any

import pytest
import torch

from callbacks import BackgroundCheckpointIO
from callbacks.host_copy import HostCopy


def test_values_containers_and_sharing_are_kept() -> None:
    weight = torch.randn(4, 6)
    parameter = torch.nn.Parameter(torch.ones(2))
    shared = ["one list"]
    module = torch.nn.Linear(2, 3).state_dict()
    state = {
        "tied": [weight, weight],
        "views": (weight[1], weight.t(), weight[:, ::2]),
        "module": module,
        "empty": torch.empty(2, 0, dtype=torch.int32),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "parameter": parameter,
        "lists": [shared, shared],
        "plain": (1, 2.5, "text", None, True),
    }
    copied, ready = HostCopy().take(state)
    ready()
    assert copied["tied"][0] is copied["tied"][1]
    assert copied["tied"][0].untyped_storage().data_ptr() == copied["views"][0].untyped_storage().data_ptr()
    assert copied["tied"][0].untyped_storage().nbytes() == weight.untyped_storage().nbytes()
    for found, expected in zip(copied["views"], state["views"], strict=True):
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()
    assert isinstance(copied["module"], OrderedDict)
    assert copied["module"]._metadata == module._metadata
    assert copied["empty"].shape == (2, 0)
    assert copied["scalar"].dtype == torch.int64
    assert isinstance(copied["parameter"], torch.nn.Parameter)
    assert copied["lists"][0] is copied["lists"][1] is not shared
    assert copied["plain"] == state["plain"]
    for tensor in (weight, parameter.data, module["weight"]):
        tensor.fill_(9.0)
    shared.append("more")
    assert not (copied["tied"][0] == 9.0).any()
    assert torch.equal(copied["parameter"], torch.ones(2))
    assert not (copied["module"]["weight"] == 9.0).any()
    assert copied["lists"][0] == ["one list"]


def test_the_memory_is_kept_as_long_as_it_is_large_enough() -> None:
    host = HostCopy()

    def address(count: int) -> int:
        return host.take([torch.zeros(count), torch.ones(3)])[0][0].data_ptr()

    first = address(1000)
    assert address(1000) == address(10) == first
    copied, _ = host.take([torch.full((100_000,), 2.0), torch.ones(3)])
    assert torch.equal(copied[0], torch.full((100_000,), 2.0))
    assert torch.equal(copied[1], torch.ones(3))
    host.close()
    assert torch.equal(copied[1], torch.ones(3))  # who still holds a copy keeps its memory


@pytest.mark.gpu
def test_on_a_gpu_the_copy_is_of_what_the_step_left_and_the_host_does_not_wait(tmp_path: Any) -> None:
    """Kernels of the step are still to come when the state is copied, those of the next follow at once; not on the default stream."""
    io = BackgroundCheckpointIO()
    with torch.cuda.stream(torch.cuda.Stream()):
        weight = torch.zeros(64, 2**20, device="cuda")
        small = [torch.zeros(5, device="cuda") for _ in range(200)]
        for step in range(1, 4):
            torch.cuda._sleep(500_000_000)  # some quarter of a second
            for tensor in (weight, *small):
                tensor.add_(1)
            io.save_checkpoint({"weight": weight, "tied": weight, "small": small, "on_cpu": torch.tensor(step)}, tmp_path / f"{step}.ckpt")
            if step > 1:  # the first also makes the memory
                assert not torch.cuda.current_stream().query()  # the device is not done, and the host is here
            for tensor in (weight, *small):
                tensor.mul_(-1).mul_(-1).add_(100).sub_(100)
    assert io._host._locked
    io.wait()
    for step in range(1, 4):
        loaded = io.load_checkpoint(tmp_path / f"{step}.ckpt")
        assert torch.equal(loaded["weight"], torch.full((64, 2**20), float(step)))
        assert loaded["weight"].data_ptr() == loaded["tied"].data_ptr()
        assert all(torch.equal(tensor, torch.full((5,), float(step))) for tensor in loaded["small"])
        assert int(loaded["on_cpu"]) == step
    io.teardown()
