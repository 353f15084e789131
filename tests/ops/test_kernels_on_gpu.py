"""What only a GPU shows of the kernels: the same bits twice, no compilation for another length, addresses beyond 2^31."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton
from cases import CASES, GPU, GPU_LOW, GPU_NARROW, Case, Setting, by_name, gradients, in_settings
from recorded import operator, recorded_arguments, recorded_launches
from support import assert_same
from torch import Tensor

from mmrec.ops.tuning import overridden

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@by_name
@in_settings([(GPU, 700), (GPU_LOW[0], 2049), (GPU_NARROW, 8197)])
def test_two_runs_give_the_same_bits(case: Case, setting: Setting, time: int) -> None:
    inputs, reset = case.draw(setting, time), case.reset(setting, time)
    outputs, grads = gradients(case.op, inputs, reset)
    for _ in range(3):
        again, grads_again = gradients(case.op, inputs, reset)
        assert all(torch.equal(actual, expected) for actual, expected in zip(again, outputs, strict=True))
        assert all(torch.equal(grads_again[name], grads[name]) for name in inputs)


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Names of the kernels that Triton compiles meanwhile."""
    names: list[str] = []
    before = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda *_, fn, **__: names.append(fn.name)
    try:
        yield names
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before


@by_name
@in_settings([(GPU, 1000), (GPU_LOW[0], 1000)])
def test_another_length_compiles_nothing(case: Case, setting: Setting, time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = setting.resized(D=1040, P=1040, H=6, K=96, V=96)  # rows of whole 16 bytes, as every network has them
    gradients(case.op, case.draw(setting, time), case.reset(setting, time))
    launched = recorded_launches(monkeypatch, [case.name])
    with compilations() as later:
        for other in (time + 1, time + 16, time - 7, 2 * time):
            gradients(case.op, case.draw(setting, other), case.reset(setting, other))
    assert launched == [case.name, f"{case.name}_bwd"] * 4
    assert later == []


def test_a_compilation_is_noticed() -> None:
    case, setting = CASES[0], GPU.resized(D=72)
    with compilations() as names, overridden(**{"exp_product_scan.forward": {"BD": 8, "R": 2, "G": 2, "STAGES": 1, "num_warps": 1}}):
        case.op(**case.draw(setting, 5))
    assert names == ["forward_kernel"]


TIME, ROW = 131072, 24576  # elements: 6.4 GB of bf16, whose last row lies 3.2e9 elements behind the first
STRIDE = 1_200_000_000  # elements: twice that lies beyond 2^31
Layout = Callable[[list[Tensor]], list[Tensor]]


def in_wide_rows(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors as slices of a buffer's rows, all but the first at the row's end."""
    buffer = torch.empty(1, TIME, ROW, dtype=torch.bfloat16, device="cuda")
    views, begin = [], 0
    for tensor in tensors:
        width = tensor[0, 0].numel()
        views.append(buffer[..., begin : begin + width].unflatten(-1, tensor.shape[2:]).copy_(tensor))
        begin = ROW - 2048 if begin == 0 else begin + width
    return views


def spread(tensors: list[Tensor], dim: int) -> list[Tensor]:
    """The tensors side by side in a buffer in which one of their dimensions has an enormous stride."""
    buffer = torch.empty(2 * STRIDE + 2**16 * len(tensors), dtype=torch.bfloat16, device="cuda")
    views = []
    for i, tensor in enumerate(tensors):
        strides = list(tensor.stride())
        strides[min(dim, tensor.ndim - 1)] = STRIDE
        views.append(buffer.as_strided(tensor.shape, strides, 2**16 * i).copy_(tensor))
    return views


def assert_layout_changes_nothing(case: Case, setting: Setting, time: int, lay_out: Layout) -> None:
    """Inputs, cotangents and gradients of channels, all of them bf16, in another layout give what compact ones do."""
    arguments = recorded_arguments(case, setting, time)

    def long(tensors: Sequence[Any]) -> list[int]:
        tokens = (setting.sizes["B"], time)
        return [i for i, t in enumerate(tensors) if isinstance(t, Tensor) and t.shape[:2] == tokens and t.dtype == torch.bfloat16]

    for name in (case.name, f"{case.name}_bwd"):
        compact = arguments[name]
        expected = operator(name)(*compact)
        args = list(compact)
        assert long(compact)
        for i, view in zip(long(compact), lay_out([compact[i] for i in long(compact)]), strict=True):
            args[i] = view
        for actual, same in zip(operator(name)(*args), expected, strict=True):
            assert_same(actual, same, torch.float32)
    written = list(expected)
    for i, view in zip(long(expected), lay_out([torch.full_like(expected[i], float("nan")) for i in long(expected)]), strict=True):
        written[i] = view
    operator(f"{case.name}_bwd_out")(*compact, *written)
    for i in long(expected):
        assert_same(written[i], expected[i], torch.float32)


@by_name
@in_settings([(GPU_LOW[2].resized(B=1, D=64, P=16, H=1, K=64, V=64), TIME)])
def test_rows_beyond_the_range_of_32_bits(case: Case, setting: Setting, time: int) -> None:
    assert_layout_changes_nothing(case, setting, time, in_wide_rows)


@by_name
@pytest.mark.parametrize("dim", [0, 2, 3])
@in_settings([(GPU_LOW[2].resized(B=3, D=3, P=3, H=3, K=3, V=3), 37)])
def test_sequences_heads_and_channels_beyond_the_range_of_32_bits(case: Case, setting: Setting, time: int, dim: int) -> None:
    assert_layout_changes_nothing(case, setting, time, lambda tensors: spread(tensors, dim))


@by_name
@pytest.mark.parametrize("time", [1, 3])
def test_more_sequences_than_a_grid_counts_in_its_second_axis(case: Case, time: int) -> None:
    batch = 65_536 + 3
    setting = GPU_LOW[0].resized(B=batch, D=16, P=16, H=1, K=16, V=16)
    inputs = case.draw(setting, time)
    results = []
    for part in (inputs, {name: tensor if name in case.constant else tensor[-3:] for name, tensor in inputs.items()}):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in part.items()}
        outputs = case.op(**leaves)
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        results.append([*outputs, *(leaf.grad for name, leaf in leaves.items() if name not in case.constant)])
    for all_of_them, last in zip(*results, strict=True):
        assert_same(all_of_them[-3:], last, torch.float32)
