"""What only a GPU shows of a window's attention: no compilation for another length, addresses beyond 2^31, any number of sequences."""

from typing import Any

import pytest
import torch
from cases import GPU, GPU_LOW, Setting, gradients, in_settings
from recorded import operator
from support import assert_same
from test_kernels_on_gpu import TIME, Layout, compilations, in_wide_rows, spread
from torch import Tensor
from window import draw, recorded_arguments

from mmrec.ops import window_attention

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
KERNELS = {"decays_kernel", "forward_kernel", "queries_kernel", "keys_kernel"}


@pytest.mark.parametrize("everything", [True, False])
@in_settings([(GPU, 1000), (GPU_LOW[0], 1000)])
def test_another_length_compiles_nothing(setting: Setting, time: int, everything: bool) -> None:
    setting = setting.resized(H=6, K=96, V=96)  # rows of whole 16 bytes, as every network has them

    def run(time: int, window: int) -> None:
        drawn = draw(setting, time, window, everything)
        gradients(drawn.of(window_attention), drawn.inputs, drawn.reset)

    run(time, 300)
    with compilations() as later:
        for other, window in ((time + 1, 300), (time + 16, 301), (time - 7, 128), (2 * time, 1000)):
            run(other, window)
    assert not KERNELS.intersection(name.rpartition(".")[2] for name in later)


def assert_layout_changes_nothing(setting: Setting, time: int, lay_out: Layout) -> None:
    """Everything as wide as a head, in another layout, gives what it gives where it is compact, but for the order of a sum."""

    def wide(tensors: Any) -> list[int]:
        return [i for i, t in enumerate(tensors) if isinstance(t, Tensor) and t.ndim == 4]

    arguments = recorded_arguments(draw(setting, time, 70, everything=False))
    for name in ("window_attention", "window_attention_bwd"):
        compact = arguments[name]
        expected = operator(name)(*compact)
        args = list(compact)
        for i, view in zip(wide(compact), lay_out([compact[i] for i in wide(compact)]), strict=True):
            args[i] = view
        for actual, same in zip(operator(name)(*args), expected, strict=True):
            assert_same(actual, same, limit=1e-3)
    written = list(expected)
    for i, view in zip(wide(expected), lay_out([torch.full_like(expected[i], float("nan")) for i in wide(expected)]), strict=True):
        written[i] = view
    operator("window_attention_bwd_out")(*compact, *written)
    for actual, same in zip(written, expected, strict=True):
        assert_same(actual, same, limit=1e-3)


@in_settings([(GPU_LOW[0].resized(B=1, H=1, K=64, V=64), TIME)])
def test_rows_beyond_the_range_of_32_bits(setting: Setting, time: int) -> None:
    assert_layout_changes_nothing(setting, time, in_wide_rows)


@pytest.mark.parametrize("dim", [0, 2, 3])
@in_settings([(GPU_LOW[0].resized(B=3, H=3, K=3, V=3), 37)])
def test_sequences_heads_and_channels_beyond_the_range_of_32_bits(setting: Setting, time: int, dim: int) -> None:
    assert_layout_changes_nothing(setting, time, lambda tensors: spread(tensors, dim))


@pytest.mark.parametrize("time", [1, 3])
def test_more_sequences_than_a_grid_counts_in_its_second_axis(time: int) -> None:
    drawn = draw(GPU_LOW[0].resized(B=65_536 + 3, H=1, K=16, V=16), time, 2, everything=False)
    last = {name: tensor if name == "temperature" else tensor[-3:] for name, tensor in drawn.inputs.items()}
    results = []
    for inputs in (drawn.inputs, last):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        r = drawn.of(window_attention)(**leaves)[0]
        r.backward(torch.ones_like(r))
        results.append([r, *(leaf.grad for name, leaf in leaves.items() if name != "temperature")])
    for all_of_them, few in zip(*results, strict=True):
        assert_same(all_of_them[-3:], few, limit=1e-3)
