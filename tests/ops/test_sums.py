"""Sums over tokens in two stages, against torch's."""

import pytest
import torch
from cases import CPU, CPU_LOW, GPU, GPU_LOW, INTERPRETED, Setting, in_settings
from kernel_tools import compiled_for
from support import assert_same

from mmrec.ops import sums
from mmrec.ops.column_sum import column_sum, column_sum_op
from mmrec.ops.sums import add_parts, launch_column_sum


@in_settings([(INTERPRETED, 1), (INTERPRETED, 300), (GPU, 1), (GPU, 2049)])
@pytest.mark.parametrize("width", [1, 37, 64])
def test_parts(setting: Setting, time: int, width: int) -> None:
    parts = torch.randn(2, time, 3, width).to(setting.device)
    first = torch.full((3, width), float("nan"), device=setting.device)
    second = torch.full((3, 2 * width), float("nan"), dtype=torch.float64, device=setting.device)[:, ::2]  # neither dtype nor strides
    add_parts(parts, first, second)
    assert_same(first, parts[0].sum(0))
    assert_same(second, parts[1].sum(0), torch.float32)
    add_parts(parts[1], first)
    assert_same(first, parts[1].sum(0))


@in_settings([(CPU, 5), (CPU_LOW[1], 5), (INTERPRETED, 1), (INTERPRETED, 700), (GPU, 700), (GPU_LOW[0], 8192)])
def test_columns(setting: Setting, time: int) -> None:
    x = torch.randn(time, 3 * 70).to(setting.device, setting.dtype)[:, 70:140]
    for dtype in (setting.dtype, setting.wide):
        actual = column_sum(x, dtype)
        torch.library.opcheck(column_sum_op, (x, dtype))
        assert actual.dtype == dtype
        assert_same(actual, x.double().sum(0), dtype, limit=3e-3 if dtype == torch.bfloat16 else None)


@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_compile(architecture: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(sums, "launch", lambda kernel, tensors, prepare: found.append((kernel, tensors, prepare())))
    launch_column_sum(torch.empty(8192, 1024, dtype=torch.bfloat16), torch.float32)
    add_parts(torch.empty(2, 512, 1024), torch.empty(1024), torch.empty(1024))
    assert len(found) == 3
    for kernel, tensors, call in found:
        assert compiled_for(architecture, kernel, (*tensors, *call.numbers), call.named)
