"""The way back through a GELU against torch's, in one pass."""

import pytest
import torch
import torch.nn.functional as F
from cases import CPU, CPU_LOW, GPU, GPU_LOW, INTERPRETED, Setting, in_settings
from kernel_tools import compiled_for
from support import TOLERANCE, assert_same

from mmrec.ops.gelu_backward import gelu_backward, gelu_backward_op, kernels

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@in_settings([(CPU, 5), (CPU_LOW[1], 5), (INTERPRETED, 1), (INTERPRETED, 70), (GPU, 700), (GPU_LOW[0], 1), (GPU_LOW[0], 8192)])
@pytest.mark.parametrize("width", [37, 256])
def test_gelu_backward(setting: Setting, time: int, width: int) -> None:
    inner, dhidden = (2 * torch.randn(time, width).to(setting.device, setting.dtype) for _ in range(2))
    leaf = inner.to(torch.float64, copy=True).requires_grad_()
    hidden = F.gelu(leaf)
    (dinner,) = torch.autograd.grad(hidden, leaf, dhidden.double())
    found = gelu_backward(dhidden, inner, setting.wide)
    assert found.dbias.dtype == setting.wide
    limit = TOLERANCE[setting.dtype]
    assert_same(found.hidden, hidden, limit=limit)
    assert_same(found.dinner, dinner, limit=limit)
    assert_same(found.dbias, dinner.sum(0), limit=limit)
    torch.library.opcheck(gelu_backward_op, (dhidden, inner, setting.wide))


@pytest.mark.parametrize("architecture", [80, 90])
def test_the_kernel_compiles(architecture: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(kernels.launching, "launch", lambda kernel, tensors, prepare: found.append((kernel, tensors, prepare())))
    monkeypatch.setattr(kernels, "add_parts", lambda *_: None)
    kernels.launch(*(torch.empty(8192, 1024, dtype=torch.bfloat16) for _ in range(2)), torch.float32)
    ((kernel, tensors, call),) = found
    assert compiled_for(architecture, kernel, (*tensors, *call.numbers), call.named)
