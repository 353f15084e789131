"""The short convolution against its naive loop: values, every gradient, splitting, packing, buffers, torch's own checks.

The same tests run the PyTorch form in float64, the kernels through Triton's interpreter (`-m interpreted`) and on a GPU (`-m gpu`).
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CPU, CPU_LOW, GPU, GPU_LOW, INTERPRETED, INTERPRETED_LOW, Case, Setting, gradients, in_float64, in_settings
from kernel_tools import SHARED_MEMORY, compiled_for
from recorded import operator, recorded_arguments, recorded_launches
from support import assert_same
from test_kernels_on_gpu import TIME, assert_layout_changes_nothing, compilations, in_wide_rows, spread
from test_operators import every_second_element, odd_offset, reversed_dimensions
from test_registration import strided, strided_like
from torch import Tensor

from mmrec.ops import short_convolution, sums
from mmrec.ops.short_convolution import kernels, short_convolution_naive

pytestmark = pytest.mark.usefixtures("poisoned_memory")
# J taps, of which S reach back.
WITH_STATE = Case("short_convolution", short_convolution, short_convolution_naive, {"x": "BTD", "weight": "DJ", "state": "BSD"}, "state")
BARE = replace(WITH_STATE, shapes={name: letters for name, letters in WITH_STATE.shapes.items() if name != "state"})
given = pytest.mark.parametrize("everything", [True, False], ids=["all given", "little given"])
taps = pytest.mark.parametrize("taps", [1, 2, 4, 16])
everywhere = in_settings([(CPU, 70), (INTERPRETED, 37), (GPU, 700), (GPU_LOW[0], 700)])


@pytest.fixture(autouse=True)
def _short_programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter of two tiles, so that a short sequence has several and a tail."""
    if request.node.get_closest_marker("interpreted"):
        monkeypatch.setattr(kernels, "_LOOP", 2)


def with_taps(setting: Setting, taps: int) -> Setting:
    """The setting of a convolution of so many taps."""
    return setting.resized(J=taps, S=taps - 1)


def draw(setting: Setting, time: int, taps: int, everything: bool = True) -> tuple[dict[str, Tensor], Tensor | None]:
    """Inputs, the state in the dtype of `x`, and document starts; `everything` false: neither state nor starts."""
    case, setting = WITH_STATE if everything else BARE, with_taps(setting, taps)
    inputs = case.draw(setting, time)
    if not everything:
        return inputs, None
    inputs["state"] = inputs["state"].to(setting.dtype)
    return inputs, case.reset(setting, time, share=0.1)


def assert_all_equal(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """To the last bit."""
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def assert_equal(actual: tuple[list[Tensor], dict[str, Tensor]], expected: tuple[list[Tensor], dict[str, Tensor]]) -> None:
    """Outputs and gradients, as `gradients` returns them; a state is a copy of inputs."""
    assert_same(actual[0][0], expected[0][0], what="y")
    assert torch.equal(actual[0][1].double(), expected[0][1].double())
    for name, gradient in expected[1].items():
        assert_same(actual[1][name], gradient, what=f"gradient to {name}")


@taps
@given
@in_settings(
    [
        *((CPU, time) for time in (1, 3, 40)),
        *((setting, time) for setting in CPU_LOW for time in (1, 40)),
        *((INTERPRETED, time) for time in (1, 3, 16, 85)),
        *((setting.resized(B=1, D=140), 37) for setting in (INTERPRETED, *INTERPRETED_LOW[:2])),
        *((setting, time) for setting in (GPU, *GPU_LOW[:2]) for time in (1, 3, 130)),
        *((setting.resized(B=4, D=4096), 2049) for setting in (GPU, GPU_LOW[0])),
    ]
)
def test_values_and_gradients_equal_the_naive_loop(setting: Setting, time: int, everything: bool, taps: int) -> None:
    inputs, reset = draw(setting, time, taps, everything)
    outputs, grads = gradients(short_convolution, inputs, reset)
    assert_equal((outputs, grads), gradients(short_convolution_naive, in_float64(inputs), reset))
    assert [output.dtype for output in outputs] == [setting.dtype] * 2
    assert outputs[0].is_contiguous()
    assert [grads[name].dtype for name in inputs] == [tensor.dtype for tensor in inputs.values()]


@in_settings([(CPU_LOW[1], 40), (INTERPRETED_LOW[0], 37), (GPU_LOW[0], 130)])
def test_gains_of_few_digits(setting: Setting, time: int) -> None:
    """As of a network that is bf16 throughout."""
    inputs, reset = draw(setting, time, 4)
    inputs["weight"] = inputs["weight"].to(setting.dtype)
    assert_equal(gradients(short_convolution, inputs, reset), gradients(short_convolution_naive, in_float64(inputs), reset))


@given
@pytest.mark.parametrize("taps", [1, 3])
def test_gradcheck(everything: bool, taps: int) -> None:
    inputs, reset = draw(CPU, 5, taps, everything)
    leaves = tuple(tensor.requires_grad_() for tensor in inputs.values())
    assert torch.autograd.gradcheck(lambda *leaves: short_convolution(*leaves, reset=reset), leaves)


def in_pieces(cuts: Sequence[int]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The convolution of one piece after another, each with the state of the one before."""

    def run(x: Tensor, weight: Tensor, state: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        pieces = []
        for begin, end in itertools.pairwise((0, *cuts, x.shape[1])):
            y, state = short_convolution(x[:, begin:end], weight, state, None if reset is None else reset[:, begin:end])
            pieces.append(y)
        return torch.cat(pieces, dim=1), state

    return run


@pytest.mark.parametrize("taps", [4, 16])
@pytest.mark.parametrize("cut", [1, 3, 16, 20, -1])
@everywhere
def test_split_and_carried_equals_whole(setting: Setting, time: int, cut: int, taps: int) -> None:
    """In every sequence a document starts at another place near the cut, in one at none."""
    places = [cut % time + behind for behind in (-15, -2, -1, 0, 1, 2)]
    inputs, reset = draw(setting.resized(B=len(places) + 1), time, taps)
    reset[:] = False
    for row, place in enumerate(places):
        reset[row, place % time] = True
    split = in_pieces([cut % time])
    assert_equal(gradients(split, inputs, reset), gradients(short_convolution, inputs, reset))


@taps
@given
@in_settings([(CPU, 40), (INTERPRETED, 5), (GPU, 70), (GPU_LOW[0], 70)])
def test_steps_equal_the_whole(setting: Setting, time: int, everything: bool, taps: int) -> None:
    inputs, reset = draw(setting, time, taps, everything)
    assert_equal(gradients(in_pieces(range(1, time)), inputs, reset), gradients(short_convolution, inputs, reset))


@taps
@everywhere
def test_packed_equals_document_by_document(setting: Setting, time: int, taps: int) -> None:
    inputs, reset = draw(setting, time, taps)
    starts = [0, 1, 2 * time // 5, 16 * (time // 25), time - 3, time]
    reset[:] = False
    reset[:, starts[1:-1]] = True

    def one_by_one(x: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        pieces = [short_convolution(x[:, i:j], weight, state if i == 0 else None) for i, j in itertools.pairwise(starts)]
        return torch.cat([y for y, _ in pieces], dim=1), pieces[-1][1]

    assert_equal(gradients(short_convolution, inputs, reset), gradients(one_by_one, inputs))


@taps
@in_settings([(CPU, 40), (CPU_LOW[0], 40), (INTERPRETED, 37), (GPU, 700)])
def test_of_another_document_not_even_nan_is_seen(setting: Setting, time: int, taps: int) -> None:
    inputs, reset = draw(setting, time, taps)
    reset[:] = False
    reset[:, 19] = True
    x = inputs["x"].clone().requires_grad_()
    with torch.no_grad():
        x[:, :19] = float("nan")
    y, last = short_convolution(x, inputs["weight"], inputs["state"], reset)
    assert y[:, :19].isnan().all()
    assert y[:, 19:].isfinite().all()
    assert last.isfinite().all()
    dy = torch.ones_like(y)
    dy[:, 19:] = float("nan")
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx[:, :19].isfinite().all()
    assert dx[:, 19:].isnan().all()


@pytest.mark.parametrize("layout", [every_second_element, odd_offset, reversed_dimensions])
@taps
@in_settings([(CPU, 9), (INTERPRETED, 19), (GPU, 130), (GPU_LOW[0], 130)])
def test_strided_inputs(setting: Setting, time: int, taps: int, layout: Callable[[Tensor, int], Tensor]) -> None:
    """Slices of wider tensors, as HEM's parts are."""
    inputs, reset = draw(setting, time, taps)
    widths = {name: tensor.shape[-1] for name, tensor in inputs.items()}
    buffers = {}
    for name, tensor in inputs.items():
        buffers[name] = tensor.new_full((*tensor.shape[:-1], 2 * widths[name] + 3), float("nan"))
        selected = torch.arange(buffers[name].shape[-1], device=tensor.device).expand_as(buffers[name])
        chosen = torch.zeros_like(buffers[name], dtype=torch.bool).scatter(-1, layout(selected, widths[name]), True)
        buffers[name].masked_scatter_(chosen, tensor)

    def of_layout(reset: Tensor, **leaves: Tensor) -> tuple[Tensor, Tensor]:
        return short_convolution(**{name: layout(leaf, widths[name]) for name, leaf in leaves.items()}, reset=reset)

    for names in (inputs.keys(), {"x", "weight"}):
        chosen = {name: buffers[name] for name in names}
        outputs, grads = gradients(of_layout, chosen, torch.stack([reset, ~reset], dim=-1)[..., 0])
        expected = gradients(short_convolution, {name: inputs[name] for name in names}, reset)
        assert_equal((outputs, {name: layout(grads[name], widths[name]) for name in names}), expected)


@taps
@in_settings([(CPU, 9), (INTERPRETED, 37), (GPU, 130), (GPU_LOW[0], 700)])
def test_gradients_go_into_views_of_a_buffer_and_nowhere_else(setting: Setting, time: int, taps: int) -> None:
    args = recorded_arguments(BARE, with_taps(setting, taps), time)["short_convolution_bwd"]
    expected = operator("short_convolution_bwd")(*args)
    buffers, views = strided_like(expected)
    operator("short_convolution_bwd_out")(*args, *views)
    assert_all_equal(views, expected)
    for view in views:
        view.fill_(float("nan"))
    assert all(buffer.isnan().all() for buffer in buffers)


@in_settings([(INTERPRETED, 21), (GPU, 37), (GPU_LOW[0], 37)])
def test_slices_of_a_fused_buffer_are_not_copied(setting: Setting, time: int) -> None:
    """Neither in the operators nor, without a state, around them."""
    backward = recorded_arguments(BARE, with_taps(setting, 4), time)["short_convolution_bwd_out"]
    dy, x, weight, reset, dx, dweight = (strided(argument) for argument in backward)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile, torch.no_grad():
        short_convolution(x, weight, reset=reset)
        operator("short_convolution_bwd_out")(dy, x, weight, reset, dx, dweight)
    copies = {"aten::contiguous", "aten::clone", "aten::copy_", "aten::to", "aten::_to_copy", "aten::cat", "aten::reshape", "aten::pad"}
    copied = [event.name for event in profile.events() if event.name in copies and list(x.shape) in event.input_shapes]
    assert not copied
    assert sum(event.name.startswith("mmrec::") for event in profile.events()) == 2


@taps
@given
@in_settings([(setting, 5) for setting in (CPU, CPU_LOW[1], INTERPRETED.resized(B=1, D=8), GPU, GPU_LOW[0])])
def test_opcheck(setting: Setting, time: int, everything: bool, taps: int) -> None:
    arguments = recorded_arguments(WITH_STATE if everything else BARE, with_taps(setting, taps), time)
    assert len(arguments) == 3
    for name, args in arguments.items():
        if name == "short_convolution":
            args = tuple(a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        torch.library.opcheck(operator(name), args)


@in_settings([(CPU_LOW[0], 9), (CPU, 9), (INTERPRETED, 9), (GPU, 9)])
def test_kernels_run_where_they_should(setting: Setting, time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = recorded_launches(monkeypatch, ["short_convolution"])
    inputs, reset = draw(setting, time, 4)
    gradients(short_convolution, inputs, reset)
    assert launched == (["short_convolution", "short_convolution_bwd"] if setting in (INTERPRETED, GPU) else [])
    launched.clear()
    gradients(short_convolution, in_float64(inputs), reset)
    assert not launched


@given
@in_settings([(CPU_LOW[0], 9), (INTERPRETED, 9), (GPU, 130)])
def test_compiled_without_a_graph_break(setting: Setting, time: int, everything: bool) -> None:
    inputs, reset = draw(setting, time, 4, everything)
    torch._dynamo.reset()
    compiled = torch.compile(short_convolution, backend="aot_eager" if setting.device == "cpu" else "inductor", fullgraph=True)
    assert_equal(gradients(compiled, inputs, reset), gradients(short_convolution, inputs, reset))


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "as before"])
@in_settings([(CPU, 70), (INTERPRETED, 70), (GPU, 700), (GPU_LOW[0].resized(B=4, D=4096), 2049)])
def test_two_runs_give_the_same_bits(setting: Setting, time: int, autocast: bool) -> None:
    inputs, reset = draw(setting, time, 4)
    outputs, grads = gradients(short_convolution, inputs, reset)
    again, grads_again = gradients(short_convolution, inputs, reset, autocast=autocast)
    assert_all_equal([*again, *grads_again.values()], [*outputs, *grads.values()])


@in_settings([(CPU, 5), (INTERPRETED, 5), (GPU, 5)])
def test_a_second_derivative_is_refused(setting: Setting, time: int) -> None:
    inputs, reset = draw(setting, time, 4)
    y, _ = short_convolution(**{name: tensor.requires_grad_() for name, tensor in inputs.items()}, reset=reset)
    with pytest.raises(RuntimeError, match="short_convolution has no second derivative"):
        torch.autograd.grad(y.sum(), list(inputs.values()), create_graph=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": (2, 0, 6)}, "T = 0; give at least one token"),
        ({"x": (3, 6)}, "the input has shape .3, 6.; give 3 dimensions"),
        ({"weight": (6, 17)}, "weight has shape .6, 17.; give .C, J. with 1 to 16 taps J"),
        ({"weight": (6, 0)}, "weight has shape .6, 0.; give .C, J. with 1 to 16 taps J"),
        ({"weight": (6, 1, 4)}, "weight has shape .6, 1, 4.; give .C, J."),
        ({"weight": (5, 4)}, "weight has shape .5, 4.; it must be .6, 4."),
        ({"state": (2, 4, 6)}, "state has shape .2, 4, 6.; it must be .2, 3, 6."),
        ({"state": (1, 3, 6)}, "state has shape .1, 3, 6.; it must be .2, 3, 6."),
        ({"reset": (2, 3)}, "reset has dtype torch.float32 and shape .2, 3."),
    ],
    ids=str,
)
def test_bad_input_is_refused_in_one_line(wrong: dict[str, tuple[int, ...]], message: str) -> None:
    shapes = {"x": (2, 3, 6), "weight": (6, 4), "state": (2, 3, 6), **wrong}
    with pytest.raises(ValueError, match=f"^short_convolution: {message}") as error:
        short_convolution(**{name: torch.zeros(shape) for name, shape in shapes.items()})
    assert "\n" not in str(error.value)


@taps
@pytest.mark.parametrize("width", [140, 4096])
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kernels_compile_and_fit(dtype: torch.dtype, architecture: int, width: int, taps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(sums, "launch", lambda *_: None)
    monkeypatch.setattr(kernels, "launch", lambda kernel, tensors, prepare: found.append((kernel, tensors, prepare())))
    x, weight = torch.empty(2, 2049, width, dtype=dtype), torch.empty(width, taps)
    for reset in (torch.zeros(x.shape[:2], dtype=torch.bool), None):
        kernels.launch_forward(x, weight, reset)
        kernels.launch_backward(x, x, weight, reset, torch.empty_like(x), torch.empty_like(weight))
    assert [kernel.__name__ for kernel, *_ in found] == ["forward_kernel", "backward_kernel"] * 2
    for kernel, tensors, call in found:
        shared = compiled_for(architecture, kernel, (*tensors, *call.numbers), call.named).metadata.shared
        assert shared <= SHARED_MEMORY[architecture], kernel.__name__


@pytest.mark.gpu
@given
@in_settings([(GPU, 1000), (GPU_LOW[0], 1000)])
def test_another_length_compiles_nothing(setting: Setting, time: int, everything: bool) -> None:
    setting = setting.resized(D=1040)  # rows of whole 16 bytes, as every network has them
    gradients(short_convolution, *draw(setting, time, 4, everything))
    with compilations() as later:
        for other in (time + 1, time + 16, time - 7, 2 * time):
            gradients(short_convolution, *draw(setting, other, 4, everything))
    assert not {"forward_kernel", "backward_kernel"}.intersection(name.rpartition(".")[2] for name in later)


@pytest.mark.timeout(600)
@in_settings([(with_taps(GPU_LOW[0].resized(B=1, D=64), 4), TIME)])
def test_rows_beyond_the_range_of_32_bits(setting: Setting, time: int) -> None:
    assert_layout_changes_nothing(BARE, setting, time, in_wide_rows)


@pytest.mark.parametrize("dim", [0, 2])
@in_settings([(with_taps(GPU_LOW[0].resized(B=3, D=3), 4), 37)])
def test_sequences_and_channels_beyond_the_range_of_32_bits(setting: Setting, time: int, dim: int) -> None:
    assert_layout_changes_nothing(BARE, setting, time, lambda tensors: spread(tensors, dim))
