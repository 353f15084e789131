"""What only a GPU shows of the kernels: the same bits twice, no compilation for another length, addresses beyond 2^31."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import triton
from cases import GPU, GPU_LOW, GPU_NARROW, Case, Setting, by_name, gradients, in_settings
from recorded import operator, recorded_arguments
from support import assert_same
from torch import Tensor

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
def test_another_length_compiles_nothing(case: Case, setting: Setting, time: int) -> None:
    # Sizes of no other test, so that here they are compiled for the first time; rows of whole 16 bytes, as every network has them.
    setting = setting.resized(D=1040, P=1040, H=6, K=96, V=96)
    with compilations() as first:
        gradients(case.op, case.draw(setting, time), case.reset(setting, time))
    assert first
    with compilations() as later:
        for other in (time + 1, time + 16, time - 7, 2 * time):
            gradients(case.op, case.draw(setting, other), case.reset(setting, other))
    assert later == []


TIME, ROW = 131072, 24576  # elements: 6.4 GB of bf16, whose last row lies 3.2e9 elements behind the first


def in_wide_rows(buffer: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """The tensors as slices of the buffer's rows, all but the first at the row's end."""
    views, begin = [], 0
    for tensor in tensors:
        width = tensor[0, 0].numel()
        views.append(buffer[..., begin : begin + width].unflatten(-1, tensor.shape[2:]).copy_(tensor))
        begin = ROW - 2048 if begin == 0 else begin + width
    return views


@by_name
@in_settings([(GPU_LOW[2].resized(B=1, D=64, P=16, H=1, K=64, V=64), TIME)])
def test_rows_beyond_the_range_of_32_bits(case: Case, setting: Setting, time: int) -> None:
    arguments = recorded_arguments(case, setting, time)
    buffer = torch.empty(1, time, ROW, dtype=torch.bfloat16, device=setting.device)
    for name in (case.name, f"{case.name}_bwd"):
        compact = arguments[name]
        expected = operator(name)(*compact)
        long = [i for i, a in enumerate(compact) if isinstance(a, Tensor) and a.shape[:2] == (1, time) and a.dtype == torch.bfloat16]
        assert long
        args = list(compact)
        for i, view in zip(long, in_wide_rows(buffer, [compact[i] for i in long]), strict=True):
            args[i] = view
        for actual, same in zip(operator(name)(*args), expected, strict=True):
            assert_same(actual, same, torch.float32)
    compact = arguments[f"{case.name}_bwd"]
    expected = operator(f"{case.name}_bwd")(*compact)
    long = [i for i, gradient in enumerate(expected) if gradient.shape[:2] == (1, time) and gradient.dtype == torch.bfloat16]
    written = list(expected)
    for i, view in zip(long, in_wide_rows(buffer, [torch.full_like(expected[i], float("nan")) for i in long]), strict=True):
        written[i] = view
    operator(f"{case.name}_bwd_out")(*compact, *written)
    for i in long:
        assert_same(written[i], expected[i], torch.float32)
