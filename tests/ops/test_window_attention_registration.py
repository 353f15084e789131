"""A window's attention as torch sees it: schemas, fakes and autograd, gradients into a caller's buffer, no copies, kernels that compile."""

from typing import Any

import pytest
import torch
from cases import CPU, CPU_LOW, GPU, GPU_LOW, INTERPRETED, Setting, gradients, in_float64, in_settings
from kernel_tools import SHARED_MEMORY, compiled_for
from recorded import operator
from support import assert_same
from test_registration import strided, strided_like
from torch import Tensor
from window import ONE_HEAD, draw, given, recorded_arguments

from mmrec.ops import WindowState, sums, window_attention
from mmrec.ops.window_attention import decays, launchers
from mmrec.ops.window_attention import operator as window_operator

pytestmark = pytest.mark.usefixtures("poisoned_memory")
KERNELS = ["decays_kernel", "forward_kernel", "decays_kernel", "queries_kernel", "keys_kernel"]


@given
@in_settings([(setting, 5) for setting in (CPU, CPU_LOW[1], ONE_HEAD, GPU, GPU_LOW[0])])
def test_opcheck(setting: Setting, time: int, everything: bool) -> None:
    arguments = recorded_arguments(draw(setting, time, 4, everything))
    assert len(arguments) == 3
    for name, args in arguments.items():
        if name == "window_attention":
            args = tuple(a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        torch.library.opcheck(operator(name), args)


@given
@in_settings([(CPU, 9), (INTERPRETED, 21), (GPU, 130), (GPU_LOW[0], 700)])
def test_gradients_go_into_views_of_a_buffer_and_nowhere_else(setting: Setting, time: int, everything: bool) -> None:
    args = recorded_arguments(draw(setting, time, 7, everything))["window_attention_bwd"]
    expected = operator("window_attention_bwd")(*args)
    buffers, views = strided_like(expected)
    operator("window_attention_bwd_out")(*args, *views)
    for view, gradient in zip(views, expected, strict=True):
        assert torch.equal(view, gradient)
        view.fill_(float("nan"))
    assert all(buffer.isnan().all() for buffer in buffers)


@in_settings([(INTERPRETED, 21), (GPU, 37), (GPU_LOW[0], 37)])
def test_slices_of_a_fused_buffer_are_not_copied(setting: Setting, time: int) -> None:
    """Nothing of a head's width is, neither in the operators nor, without a state, around them."""
    drawn = draw(setting, time, 7, everything=False)
    inputs = {name: strided(tensor) for name, tensor in drawn.inputs.items()}
    backward = tuple(strided(a) for a in recorded_arguments(drawn)["window_attention_bwd_out"])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile, torch.no_grad():
        window_attention(**inputs, window=7, reset=torch.zeros(inputs["q"].shape[:2], dtype=torch.bool, device=setting.device))
        operator("window_attention_bwd_out")(*backward)
    copies = {"aten::contiguous", "aten::clone", "aten::copy_", "aten::to", "aten::_to_copy", "aten::cat", "aten::reshape", "aten::pad"}
    seen = [(event.name, event.input_shapes) for event in profile.events() if event.name in copies]
    assert not [(name, shapes) for name, shapes in seen if any(len(shape) >= 4 for shape in shapes)]
    assert [event.name for event in profile.events() if event.name.startswith("mmrec::")]


def recorded_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets the names of the kernels that are launched."""
    launched: list[str] = []
    right = launchers.launch

    def noted(kernel: Any, *rest: Any) -> None:
        launched.append(kernel.__name__ if hasattr(kernel, "__name__") else kernel.fn.__name__)
        right(kernel, *rest)

    for module in (decays, launchers):
        monkeypatch.setattr(module, "launch", noted)
    return launched


@in_settings([(CPU_LOW[0], 9), (CPU, 9), (INTERPRETED, 9), (GPU, 9)])
def test_kernels_run_where_they_should(setting: Setting, time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = recorded_kernels(monkeypatch)
    drawn = draw(setting, time, 7)
    gradients(drawn.of(window_attention), drawn.inputs, drawn.reset)
    assert launched == (KERNELS if setting in (INTERPRETED, GPU) else [])
    launched.clear()
    gradients(drawn.of(window_attention), in_float64(drawn.inputs), drawn.reset)
    assert not launched


@in_settings([(CPU, 5), (INTERPRETED, 5), (GPU, 5)])
def test_a_second_derivative_is_refused(setting: Setting, time: int) -> None:
    drawn = draw(setting, time, 4)
    inputs = {name: tensor.requires_grad_() for name, tensor in drawn.inputs.items()}
    r = drawn.of(window_attention)(drawn.reset, **inputs)[0]
    with pytest.raises(RuntimeError, match="window_attention has no second derivative"):
        torch.autograd.grad(r.sum(), list(inputs.values()), create_graph=True)


@given
@in_settings([(CPU_LOW[0], 9), (INTERPRETED, 9), (GPU, 130)])
def test_compiled_without_a_graph_break(setting: Setting, time: int, everything: bool) -> None:
    drawn = draw(setting, time, 7, everything)
    torch._dynamo.reset()
    compiled = torch.compile(drawn.of(window_attention), backend="aot_eager" if setting.device == "cpu" else "inductor", fullgraph=True)
    outputs, grads = gradients(drawn.of(window_attention), drawn.inputs, drawn.reset)
    again, grads_again = gradients(compiled, drawn.inputs, drawn.reset)
    for actual, expected in zip([*again, *grads_again.values()], [*outputs, *grads.values()], strict=True):
        assert_same(actual, expected)


def test_what_is_refused() -> None:
    drawn = draw(CPU, 3, 4)
    q, k, v, log_alpha, temperature, window, state, reset = drawn.arguments()
    with pytest.raises(ValueError, match="window_attention: T = 0"):
        window_attention(q[:, :0], k[:, :0], v[:, :0], log_alpha[:, :0], temperature, window)
    with pytest.raises(ValueError, match="window = 0"):
        window_attention(q, k, v, log_alpha, temperature, 0)
    with pytest.raises(ValueError, match="reset has dtype"):
        window_attention(q, k, v, log_alpha, temperature, window, reset=reset.long())
    for name, wrong in {"k": k[..., 1:], "v": v[:, 1:], "log_alpha": log_alpha[:, 1:], "temperature": temperature[1:]}.items():
        arguments = {"q": q, "k": k, "v": v, "log_alpha": log_alpha, "temperature": temperature, "window": window, name: wrong}
        with pytest.raises(ValueError, match=rf"window_attention: {name} has shape .* must be"):
            window_attention(**arguments)
    for name in WindowState._fields:
        wrong_state = state._replace(**{name: getattr(state, name)[:, 1:]})
        with pytest.raises(ValueError, match=rf"window_attention: state.{name} has shape .* must be"):
            window_attention(q, k, v, log_alpha, temperature, window, wrong_state)


@given
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "key_width", "value_width"),
    [
        *((torch.bfloat16, width, width) for width in (20, 64, 128, 256, 512)),
        (torch.bfloat16, 20, 64),
        (torch.float32, 128, 128),
        (torch.float16, 20, 36),
    ],
    ids=str,
)
def test_kernels_compile_and_fit(
    dtype: torch.dtype, key_width: int, value_width: int, architecture: int, everything: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token too; on Ampere, whose shared memory is smaller, with fewer stages if need be, as `launch` does."""
    found: list[Any] = []
    monkeypatch.setattr(window_operator, "runs_kernel", lambda *_: True)
    monkeypatch.setattr(sums, "launch", lambda *_: None)
    for module in (decays, launchers):
        monkeypatch.setattr(module, "launch", lambda kernel, tensors, prepare, *_: found.append((kernel, tensors, prepare())))
    setting = Setting("any", dtype, sizes={"B": 2, "H": 2, "K": key_width, "V": value_width})
    for time in (1, 300):
        drawn = draw(setting, time, 200, everything)
        gradients(drawn.of(window_attention), drawn.inputs, drawn.reset)
    assert [kernel.__name__ for kernel, *_ in found] == KERNELS * 2
    for kernel, tensors, call in found:
        shared = compiled_for(architecture, kernel, (*tensors, *call.numbers), call.named).metadata.shared
        if architecture < 90 and shared > SHARED_MEMORY[architecture]:
            shared = compiled_for(architecture, kernel, (*tensors, *call.numbers), call.named | {"STAGES": 1}).metadata.shared
        assert shared <= SHARED_MEMORY[architecture], kernel.__name__
