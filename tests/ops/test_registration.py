"""The operators as torch sees them: schemas, fakes and autograd, gradients into a caller's buffer, no copies, which form runs."""

import pytest
import torch
from cases import CPU, CPU_LOW, GPU, GPU_LOW, INTERPRETED, Case, Setting, by_name, in_settings
from recorded import operator, recorded_arguments, recorded_launches
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned_memory")
# Groups of which a stripe holds whole ones: where they straddle stripes, their gradients are summed from an fp32 tensor.
UNGROUPED = INTERPRETED.resized(B=1, P=6, H=1)


@by_name
@pytest.mark.parametrize("with_state", [True, False], ids=["state", "no state"])
@in_settings([(setting, 5) for setting in (CPU, CPU_LOW[1], INTERPRETED.resized(B=1, D=8, H=1), GPU, GPU_LOW[0])])
def test_opcheck(case: Case, setting: Setting, time: int, with_state: bool) -> None:
    arguments = recorded_arguments(case, setting, time, with_state)
    assert len(arguments) == 3
    for name, args in arguments.items():
        if name == case.name:
            args = tuple(a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        torch.library.opcheck(operator(name), args)


def strided_like(gradients: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """NaN-filled buffers, and a view in them for every gradient; those of one dtype with a time dimension are slices of one buffer."""
    tokens = gradients[0].shape[:2]
    buffers: list[Tensor] = []
    views: list[Tensor | None] = [None] * len(gradients)
    for dtype in {gradient.dtype for gradient in gradients}:
        fused = [i for i, gradient in enumerate(gradients) if gradient.dtype == dtype and gradient.shape[:2] == tokens]
        widths = [gradients[i][0, 0].numel() for i in fused]
        if fused:
            buffers.append(gradients[fused[0]].new_full((*tokens, sum(widths) + 3 * len(fused)), float("nan")))
            begin = 1
            for i, width in zip(fused, widths, strict=True):
                views[i] = buffers[-1][..., begin : begin + width].unflatten(-1, gradients[i].shape[2:])
                begin += width + 3
    for i, gradient in enumerate(gradients):
        if views[i] is None:
            buffers.append(gradient.new_full((*gradient.shape[:-1], 2 * gradient.shape[-1]), float("nan")))
            views[i] = buffers[-1][..., ::2]
    return tuple(buffers), tuple(views)


@by_name
@pytest.mark.parametrize("with_state", [True, False], ids=["state", "no state"])
@in_settings([(CPU, 9), (UNGROUPED, 21), (GPU, 130), (GPU_LOW[0], 700)])
def test_gradients_go_into_views_of_a_buffer_and_nowhere_else(case: Case, setting: Setting, time: int, with_state: bool) -> None:
    args = recorded_arguments(case, setting, time, with_state)[f"{case.name}_bwd"]
    expected = operator(f"{case.name}_bwd")(*args)
    buffers, views = strided_like(expected)
    operator(f"{case.name}_bwd_out")(*args, *views)
    for view, gradient in zip(views, expected, strict=True):
        assert torch.equal(view, gradient)
        view.fill_(float("nan"))
    assert all(buffer.isnan().all() for buffer in buffers)


@by_name
@in_settings([(UNGROUPED, 21), (GPU.resized(P=160), 37), (GPU_LOW[0].resized(P=160), 37)])  # groups that the kernel sums itself
def test_slices_of_a_fused_buffer_are_not_copied(case: Case, setting: Setting, time: int) -> None:
    """Inputs, cotangents and gradients are slices of wider tensors, as HEM's parts are; no step of them is a copy."""
    name = case.name
    arguments = recorded_arguments(case, setting, time)
    forward = tuple(strided(a) for a in arguments[name])
    backward = tuple(strided(a) for a in arguments[f"{name}_bwd_out"])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        operator(name)(*forward)
        operator(f"{name}_bwd_out")(*backward)
    copies = {"aten::contiguous", "aten::clone", "aten::copy_", "aten::to", "aten::_to_copy", "aten::cat", "aten::reshape"}
    long = setting.sizes["B"] * time * 2  # a mask or a count a token is allowed, a tensor of channels is not
    seen = [
        (event.name, event.input_shapes)
        for event in profile.events()
        if event.name in copies and any(len(shape) >= 3 and torch.Size(shape).numel() > long for shape in event.input_shapes)
    ]
    assert not seen
    assert any(event.name.startswith("mmrec::") for event in profile.events())


def strided(argument: object) -> object:
    """A tensor of three dimensions or more as a slice of a wider one, at an odd offset; anything else as it is."""
    if not isinstance(argument, Tensor) or argument.ndim < 3:
        return argument
    flat = argument.flatten(2)
    view = flat.new_full((*flat.shape[:2], 2 * flat.shape[2] + 7), float("nan"))[..., 5 : 5 + flat.shape[2]]
    return view.copy_(flat).unflatten(-1, argument.shape[2:])


@by_name
@in_settings([(CPU_LOW[0], 9), (CPU, 9), (INTERPRETED, 9), (GPU, 9)])
def test_kernels_run_where_they_should(case: Case, setting: Setting, time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels on CUDA and in the interpreter; the PyTorch form on a CPU, and for float64 everywhere."""
    launched = recorded_launches(monkeypatch, [case.name])
    recorded_arguments(case, setting, time)
    backward = f"{case.name}_bwd"
    assert launched == ([case.name, backward, backward] if setting in (INTERPRETED, GPU) else [])
    launched.clear()
    inputs = {name: tensor.double() for name, tensor in case.draw(setting, time).items()}
    case.op(**inputs)
    assert not launched


@by_name
@in_settings([(CPU, 5), (INTERPRETED, 5), (GPU, 5)])
def test_a_second_derivative_is_refused(case: Case, setting: Setting, time: int) -> None:
    inputs = {name: tensor.requires_grad_() for name, tensor in case.draw(setting, time).items()}
    output, _ = case.op(**inputs)
    with pytest.raises(RuntimeError, match=f"{case.name} has no second derivative"):
        torch.autograd.grad(output.sum(), list(inputs.values()), create_graph=True)
