"""The fused recurrent half against the chain of its operators: values, every gradient, one buffer for the projections' gradients."""

from typing import Any

import pytest
import torch
from support import assert_same
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from mmrec.blocks import mm_rec_block
from mmrec.blocks.mm_rec_block import MMRecBlock
from mmrec.core.memory import BlockState

B, T, D, H, P = 2, 13, 24, 3, 8


class Aten(TorchDispatchMode):
    """Keeps the names and first outputs' sizes of torch's own operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten":
            self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def make_block(**fields: Any) -> MMRecBlock:
    torch.manual_seed(3)
    block = MMRecBlock(model_dim=D, num_heads=H, pe_dim=P, dpg_rank=4, **fields).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return block


def run(block: MMRecBlock, carried: bool, planned: bool, reset: Tensor | None = None) -> list[Tensor]:
    """Outputs and the gradients of everything, of random projections of all outputs."""
    torch.manual_seed(4)
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    state = None
    if carried:
        state = BlockState(torch.randn(B, D).double().requires_grad_(), torch.randn(B, H, D // H, D // H).double().requires_grad_())
        reset = torch.rand(B, T) < 0.2
    outputs = block(x, state=state, reset=reset, return_auxiliary_loss=planned, return_state=True)
    y, after = outputs[0], outputs[-1]
    memory = [tensor for tensor in after.kept()[1:] if tensor.is_floating_point() and tensor.numel()]
    results = [y, after.h, *memory, *([outputs[1].mean(), after.planning] if planned else [])]
    leaves = [x, *(p for p in block.parameters() if p.requires_grad), *([state.h, state.M] if state else [])]
    gradients = torch.autograd.grad(results, leaves, [torch.randn_like(r) for r in results], allow_unused=True)
    return [*results, *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("use_hem", [True, False])
@pytest.mark.parametrize("use_dpg", [True, False])
@pytest.mark.parametrize(("planned", "orthogonalize"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("carried", [True, False])
def test_fused_equals_composed(use_hem: bool, use_dpg: bool, planned: bool, orthogonalize: bool, carried: bool) -> None:
    block = make_block(use_hem=use_hem, use_dpg=use_dpg, use_uboo=planned, orthogonalize=orthogonalize)
    actual = run(block, carried, planned)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(MMRecBlock, "_mixed", MMRecBlock._composed)
        expected = run(block, carried, planned)
    assert len(actual) == len(expected) > 20
    for ours, theirs in zip(actual, expected, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("use_hem", [True, False])
@pytest.mark.parametrize(("planned", "orthogonalize"), [(False, False), (True, True)])
@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("recompute", ["selective", False])
@pytest.mark.parametrize("window_conv", [1, 4, 16])
def test_with_a_window_fused_equals_composed(
    use_hem: bool, planned: bool, orthogonalize: bool, documents: bool, recompute: Any, window_conv: int
) -> None:
    options = {"use_uboo": planned, "orthogonalize": orthogonalize, "activation_checkpointing": recompute}
    block = make_block(use_hem=use_hem, window_every=1, window=5, window_conv=window_conv, **options)
    assert block.has_window
    assert (block.convolution is None) == (window_conv == 1)
    reset = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) < 0.2 if documents else None
    actual = run(block, False, planned, reset)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(MMRecBlock, "_mixed", MMRecBlock._composed)
        expected = run(block, False, planned, reset)
    assert len(actual) == len(expected) > 20
    for ours, theirs in zip(actual, expected, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({}, 2 * D + 2 * H),  # addresses and their scales; on a CPU no memories
        ({"window_every": 1, "window": 5, "window_conv": 1}, 4 * D),  # addresses, and what they are made of
        ({"window_every": 1, "window": 5}, 4 * D),
    ],
    ids=["matrix", "window", "convolution"],
)
def test_what_is_formed_again_is_the_same(options: dict[str, Any], numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    block, carried = make_block(**options), not options  # a carried window's operators stand alone
    expected = run(block, carried, False)
    right, kept = mm_rec_block.mix, {}
    for recompute in (False, True):
        monkeypatch.setattr(mm_rec_block, "mix", lambda *a, _again=recompute, **options: right(*a, **{**options, "recompute": _again}))
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            actual = run(block, carried, False)
        kept[recompute] = sum(sizes)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert kept[False] - kept[True] == B * T * numbers


def test_the_backward_concatenates_nothing() -> None:
    block = make_block(use_uboo=False)
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    y = block(x)
    with Aten() as recorded:
        y.sum().backward()
    assert "cat" not in recorded.names


@pytest.mark.parametrize("checkpointing", [False, "selective"])
def test_a_hook_on_a_last_product_runs(checkpointing: Any) -> None:
    block = make_block(use_uboo=False, activation_checkpointing=checkpointing)
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    calls: list[str] = []
    for name in ("W_o", "ffn.W_down"):
        linear = block.get_submodule(name)
        handles = [linear.register_forward_hook(lambda *_, name=name: calls.append(name))]
        handles.append(linear.register_full_backward_hook(lambda *_, name=name: calls.append(f"{name} backward")))
        block(x).sum().backward()
        for handle in handles:
            handle.remove()
    assert calls == ["W_o", "W_o backward", "ffn.W_down", "ffn.W_down backward"]


def test_no_second_derivative_is_made_up() -> None:
    block = make_block(use_uboo=False)
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    gated = block._mixed(block.norm(x), block.head_decay(block.norm(x)), None, None, False)[0]
    with pytest.raises(RuntimeError, match="a block has no second derivative"):
        torch.autograd.grad(gated.square().sum(), x, create_graph=True)


@pytest.mark.gpu
def test_forward_and_backward_copy_nothing_on_a_gpu() -> None:
    """bf16 throughout: under autocast the weights are cast."""
    block = MMRecBlock(model_dim=512, num_heads=4, pe_dim=128, use_uboo=False).to("cuda", torch.bfloat16)
    x = torch.randn(2, 256, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)
    wanted = [x, *(p for p in block.parameters() if p.requires_grad)]
    torch.autograd.grad(block(x), wanted, dy)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        torch.autograd.grad(block(x), wanted, dy)
        torch.cuda.synchronize()
    big = x.numel()
    names = [event.name for event in recorded.events() or []]
    assert not [name for name in names if name in ("aten::cat", "aten::contiguous", "aten::clone")]
    copies = [e for e in recorded.events() or [] if e.name == "aten::copy_" and any(torch.Size(s).numel() >= big for s in e.input_shapes)]
    assert not copies
    assert not [name for name in names if "CatArray" in name]
