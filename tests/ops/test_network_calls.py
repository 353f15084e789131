"""The wiring: the network calls each operator, in both directions, and a compiled block sees each as one node."""

import pytest
import torch
from cases import CPU_LOW, GPU, INTERPRETED, Setting, in_settings
from recorded import recorded_launches
from support import RecordedOperators, assert_same
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2

from mmrec.blocks.mm_rec_block import MMRecBlock
from mmrec.core.memory import BlockState
from mmrec.model import MMRecModel

# `state_gate`, whether a state is carried in, and the operators that must run.
FIRST = ["rms_norm", "head_decay"]
REST = ["memory_address", "memory_scan", "gated_read_out", "rms_norm", "swiglu"]
CALLS = [
    (True, False, [*FIRST, "gated_scan_from_logits", *REST]),
    (True, True, [*FIRST, "gated_scan_from_logits", *REST]),
    (False, False, [*FIRST, "decay_log", "linear_scan", *REST]),
    (False, True, [*FIRST, "decay_log", "linear_scan", "exp_product_scan", *REST]),
]
calls = pytest.mark.parametrize(("state_gate", "carried", "expected"), CALLS)
# Operators whose launcher is another's, and those of the gates' and the linear layers' gradients.
VARIANTS = {
    "rms_norm_with_copy": "rms_norm",
    "memory_address_scaled": "memory_address",
    "memory_scan_kept": "memory_scan",
    "addressed_memory_bwd": "memory_scan_bwd",
}
PRODUCTS = {"column_sum", "gelu_backward", "wide_product"}


def launchers_of(names: list[str]) -> list[str]:
    """Operators by name as their launchers are called, without those that have none."""
    plain = [name.replace("_bwd_out", "_bwd") for name in names if name not in PRODUCTS]
    return [VARIANTS.get(name, name) for name in plain]


def backward_of(expected: list[str], state_gate: bool) -> list[str]:
    """What must run backward; in one function with the recurrences, the addresses are part of the memory's."""
    return [f"{name}_bwd" for name in reversed(expected) if not (state_gate and name == "memory_address")]


def block_and_inputs(setting: Setting, state_gate: bool, carried: bool, time: int) -> tuple[MMRecBlock, torch.Tensor, BlockState | None]:
    width = 32 if setting.device == "cpu" else 640
    block = MMRecBlock(model_dim=width, num_heads=2 if width == 32 else 5, pe_dim=width // 4, state_gate=state_gate).to(setting.device)
    x = torch.randn(1, time, width).to(setting.device)
    _, state = block(x, return_state=True) if carried else (None, None)
    return block, x, state and BlockState(*(None if part is None else part.detach().requires_grad_() for part in state))


@calls
@in_settings([(CPU_LOW[0], 9), (INTERPRETED, 9), (GPU, 130)])
def test_the_network_calls_its_operators(
    setting: Setting, time: int, state_gate: bool, carried: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    width = 32 if setting.device == "cpu" else 640
    heads = 2 if setting.device == "cpu" else 5  # of 128 at most: of wider ones the addresses' gradients are a step of their own
    model = MMRecModel(vocab_size=50, model_dim=width, num_layers=2, num_heads=heads, pe_dim=8, state_gate=state_gate).to(setting.device)
    tokens = torch.randint(50, (1, time)).to(setting.device)
    with torch.no_grad():
        state = model(tokens, return_state=True)[1] if carried else None
    launched = recorded_launches(monkeypatch, {name for _, _, names in CALLS for name in names})
    with RecordedOperators() as recorded:
        logits, _ = model(tokens, state=state, return_state=True)
        forward = list(recorded.names)
        logits.square().mean().backward()
    assert launchers_of(forward) == [*expected * 2, "rms_norm"]
    backward = launchers_of(recorded.names[len(forward) :])
    assert backward[0] == "rms_norm_bwd"
    order = backward_of(expected * 2, state_gate)
    # Which of the norm's two readers comes first is up to autograd.
    assert [name for name in backward[1:] if name != "head_decay_bwd"] == [name for name in order if name != "head_decay_bwd"]
    assert backward.count("head_decay_bwd") == 2
    assert launched == (launchers_of(recorded.names) if setting in (INTERPRETED, GPU) else [])


@calls
@in_settings([(CPU_LOW[0], 9), (INTERPRETED, 9), (GPU, 130)])
def test_a_compiled_block_has_no_graph_break(setting: Setting, time: int, state_gate: bool, carried: bool, expected: list[str]) -> None:
    block, x, state = block_and_inputs(setting, state_gate, carried, time)
    reset = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    reset[:, 5] = True
    backend = "aot_eager" if setting.device == "cpu" else "inductor"
    torch._dynamo.reset()
    results = []
    for function in (block, torch.compile(block, backend=backend, fullgraph=True)):
        block.zero_grad()
        y, after = function(x, state=state, reset=reset, return_state=True)
        (y.square().mean() + after.h.sum() + after.M.square().mean()).backward()
        results.append([y.detach(), *(p.grad.clone() for p in block.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 5
    for actual, same in zip(results[1], results[0], strict=True):
        # The compiler may reorder the sums of norms and products.
        assert_same(actual, same, limit=1e-4 if setting.device == "cuda" else None)
    assert torch._dynamo.explain(block)(x, state=state, reset=reset, return_state=True).graph_break_count == 0


@calls
@in_settings([(CPU_LOW[0], 9)])
def test_a_compiled_block_sees_an_operator_as_one_node(
    setting: Setting, time: int, state_gate: bool, carried: bool, expected: list[str]
) -> None:
    block, x, state = block_and_inputs(setting, state_gate, carried, time)
    graphs: list[list[str]] = []

    def keep(graph: torch.fx.GraphModule, _inputs: object) -> object:
        # A mutating operator appears as the argument of a node that makes it functional.
        called = [node.args[0] if node.target is auto_functionalized_v2 else node.target for node in graph.graph.nodes]
        targets = [target for target in called if isinstance(target, torch._ops.OpOverload)]
        graphs.append([target._opname for target in targets if target.namespace == "mmrec"])
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    torch.compile(block, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)(x, state=state).sum().backward()
    assert sorted(launchers_of(graphs[0])) == sorted(expected)
    assert sorted(launchers_of(graphs[1])) == sorted(backward_of(expected, state_gate))


@in_settings([(CPU_LOW[0], 9), (INTERPRETED, 9), (GPU, 130)])
@pytest.mark.parametrize("name", ["ffn", "ffn.W_down", "W_o", "norm"])
def test_a_hook_sees_the_stream_as_it_was(setting: Setting, time: int, name: str) -> None:
    """The kernels overwrite copies of the stream; not where someone looks on."""
    block, x, _ = block_and_inputs(setting, True, False, time)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(block(x).square().mean(), x)
    module, seen = block.get_submodule(name), []
    handles = [module.register_full_backward_hook(lambda *_: seen.append("backward"))]
    handles.append(module.register_forward_hook(lambda _, arguments, output: seen.append(arguments[min(1, len(arguments) - 1)].clone())))
    (actual,) = torch.autograd.grad(block(x).square().mean(), x)
    assert_same(actual, expected)
    if name != "norm":  # which a block does not call: it opens its branch
        assert seen[-1] == "backward"
    if name == "ffn":
        assert not torch.equal(seen[0], block(x))
    for handle in handles:
        handle.remove()
