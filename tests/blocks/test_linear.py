"""Linear layers under autocast: what they compute, and gradients of weights that are fp32 sums, not rounded ones."""

from typing import Any

import pytest
import torch
from support import relative_error
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mmrec.blocks.linear import add_linear, apply_linear
from mmrec.blocks.swiglu import SwiGLU
from mmrec.ops.wide_product import wide_product, wide_product_op

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def case(device: str, bias: bool) -> tuple[nn.Linear, Tensor, Tensor]:
    module = nn.Linear(48, 32, bias=bias).to(device)
    x = torch.randn(2, 600, 48, device=device, dtype=torch.bfloat16, requires_grad=True)
    return module, x, torch.randn(2, 600, 32, device=device, dtype=torch.bfloat16, requires_grad=True)


def gradients(output: Tensor, *leaves: Any) -> list[Tensor]:
    torch.manual_seed(1)
    cotangent = torch.randn(output.shape).to(output.device, torch.bfloat16).to(output.dtype)
    return list(torch.autograd.grad(output, [leaf for leaf in leaves if leaf is not None], cotangent))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["bias", "plain", "stream"])
def test_gradients_of_weights_are_not_rounded(device: str, form: str) -> None:
    module, x, stream = case(device, form == "bias")
    leaves = (x, module.weight, module.bias, stream if form == "stream" else None)
    with torch.autocast(device, torch.bfloat16):
        ours = add_linear(stream, x, module) if form == "stream" else apply_linear(x, module)
        theirs = stream + module(x) if form == "stream" else module(x)
    # What is multiplied is rounded in either form; what comes of it is to be exact.
    narrow = [None if leaf is None else leaf.detach().bfloat16().double().requires_grad_() for leaf in leaves]
    wide = nn.functional.linear(*narrow[:3])
    wide = wide if narrow[3] is None else wide + narrow[3]
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, wide) < 4e-3
    found, torchs, true = (gradients(ours, *leaves), gradients(theirs, *leaves), gradients(wide, *narrow))
    assert [g.dtype for g in found] == [g.dtype for g in torchs]
    for mine, other, truth in zip(found[1:], torchs[1:], true[1:], strict=True):
        assert relative_error(mine, truth) <= (1e-5 if mine.dtype == torch.float32 else relative_error(other, truth))
    assert relative_error(found[0], true[0]) < 6e-3
    assert relative_error(torchs[1], true[1]) > 1e-4  # what is to be gained


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("last", [add_linear, "feed-forward"])
def test_an_owned_stream_becomes_the_sum(device: str, autocast: bool, last: Any) -> None:
    """The same output and gradients, in the stream's own memory."""
    if last == "feed-forward":
        ffn = SwiGLU(48, 16, recompute=True).to(device)
        leaves, run = [ffn.W_gate_up.weight, ffn.W_down.weight], lambda stream, x, owned: ffn(x, stream, owned)
    else:
        module = nn.Linear(48, 48, bias=False).to(device)
        leaves, run = [module.weight], lambda stream, x, owned: add_linear(stream, x, module, owned)
    dtype = torch.bfloat16 if autocast else torch.float32
    stream, x = (torch.randn(2, 30, 48, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    outputs = []
    for owned in (True, False):
        copy = stream.clone()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            output = run(copy, x, owned)
        assert (output.data_ptr() == copy.data_ptr()) == owned
        outputs.append([output, *gradients(output, stream, x, *leaves)])
    for ours, expected in zip(*outputs, strict=True):
        assert relative_error(ours, expected) < (8e-3 if autocast else 1e-6)


def test_without_autocast_and_with_hooks_it_is_the_module() -> None:
    module, x, _ = case("cpu", True)
    assert torch.equal(apply_linear(x.float(), module), module(x.float()))
    calls: list[int] = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    with torch.autocast("cpu", torch.bfloat16):
        apply_linear(x, module)
    handle.remove()
    assert calls == [1]


def test_without_gradients_autocast_narrows_once() -> None:
    module, x, stream = case("cpu", False)
    streams = [stream.detach().clone() for _ in range(3)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), profile(activities=[ProfilerActivity.CPU]) as recorded:
        found = [(apply_linear(x, module), add_linear(own, x, module, owned=True)) for own in streams]
    assert sum(event.name == "aten::_to_copy" for event in recorded.events() or []) == 1
    with torch.autocast("cpu", torch.bfloat16):
        expected = module(x)
    for (plain, added), own in zip(found, streams, strict=True):
        assert torch.equal(plain, expected)
        assert torch.equal(added, stream + expected)
        assert added.data_ptr() == own.data_ptr()


def test_an_fp32_stream_recomputes_too() -> None:
    ffn = SwiGLU(48, 16, recompute=True)
    x, stream = torch.randn(2, 30, 48, dtype=torch.bfloat16), torch.randn(2, 30, 48, requires_grad=True)
    ffn.W_down.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        ffn(x, stream).square().sum().backward()
    assert ffn.W_gate_up.weight.grad is not None
    assert ffn.W_down.weight.grad is None


def test_a_frozen_weight_gets_none() -> None:
    module, x, _ = case("cpu", True)
    module.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        apply_linear(x, module).sum().backward()
    assert x.grad is not None
    assert module.weight.grad is None
    assert module.bias.grad is None


@pytest.mark.parametrize("device", DEVICES)
def test_wide_product(device: str) -> None:
    a, b = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in ((40, 300), (300, 16)))
    for dtype in (torch.bfloat16, torch.float32):
        torch.library.opcheck(wide_product_op, (a, b, dtype))
        assert relative_error(wide_product(a, b, dtype), a.double() @ b.double()) < (4e-3 if dtype == torch.bfloat16 else 1e-6)
