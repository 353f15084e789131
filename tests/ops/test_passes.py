"""The elementwise passes around the recurrences against their formulas: values, gradients, strides, buffers, torch's own checks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from cases import CPU, CPU_LOW, GPU, GPU_LOW, INTERPRETED, INTERPRETED_LOW, Setting, in_settings
from recorded import operator
from support import TOLERANCE, assert_same
from test_compilation import SHARED_MEMORY, compiled_for
from torch import Tensor

from mmrec.ops import decay_log, gated_read_out, head_decay, memory_address, planning_error, rms_norm, rms_norm_branch, sums, swiglu
from mmrec.ops.decay_log import decay_log_naive
from mmrec.ops.decay_log import kernels as decay_kernels
from mmrec.ops.gated_read_out import gated_read_out_naive
from mmrec.ops.gated_read_out import kernels as read_out_kernels
from mmrec.ops.head_decay import head_decay_naive
from mmrec.ops.head_decay import kernels as head_kernels
from mmrec.ops.memory_address import kernels as address_kernels
from mmrec.ops.memory_address import memory_address_naive
from mmrec.ops.planning_error import kernels as planning_kernels
from mmrec.ops.planning_error import planning_error_naive
from mmrec.ops.rms_norm import kernels as norm_kernels
from mmrec.ops.rms_norm import rms_norm_naive
from mmrec.ops.rms_norm.operator import rms_norm_with_copy
from mmrec.ops.swiglu import kernels as swiglu_kernels
from mmrec.ops.swiglu import swiglu_naive

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def as_list(results: Any) -> list[Tensor]:
    """Of one tensor or several."""
    return [results] if isinstance(results, Tensor) else list(results)


@dataclass(frozen=True)
class Pass:
    """An operator, its truth, the shapes of its inputs, the arguments that follow them, and what its backward takes before them."""

    name: str
    op: Callable[..., Any]
    naive: Callable[..., Any]
    shapes: dict[str, str]
    options: tuple[float, ...] = ()
    wide_output: bool = False
    between: Callable[[list[Tensor]], list[Tensor]] = lambda inputs: []

    @property
    def long(self) -> list[int]:
        """Indices of the inputs with a time dimension."""
        return [i for i, letters in enumerate(self.shapes.values()) if "T" in letters]

    def draw(self, setting: Setting, time: int) -> list[Tensor]:
        """Fresh random inputs; gains and biases are fp32 as in a mixed-precision network."""
        sizes = {**setting.sizes, "T": time}
        shapes = [[sizes[letter] for letter in letters] for letters in self.shapes.values()]
        kinds = [setting.dtype if "T" in letters else setting.wide for letters in self.shapes.values()]
        return [torch.randn(shape, dtype=setting.wide).to(setting.device, kind) for shape, kind in zip(shapes, kinds, strict=True)]

    def backward_arguments(self, inputs: list[Tensor]) -> tuple[Any, ...]:
        """Of `…_bwd`: random cotangents, what else it needs, and the inputs."""
        cotangents = [torch.randn_like(output) for output in as_list(self.op(*inputs, *self.options))]
        return (*cotangents, *self.between(inputs), *inputs, *self.options)

    def run(self, function: Callable[..., Any], inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs, and gradients of a random projection of them."""
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        outputs = function(*leaves, *self.options)
        outputs = as_list(outputs)
        generator = torch.Generator().manual_seed(3)
        cotangents = [torch.randn(o.shape, generator=generator).bfloat16().to(o.device, o.dtype) for o in outputs]
        return outputs, list(torch.autograd.grad(outputs, leaves, cotangents))


ADDRESS = Pass("memory_address", memory_address, memory_address_naive, {"q": "BTHK", "k": "BTHK", "h": "BTHK"})
READ_OUT = Pass(
    "gated_read_out",
    gated_read_out,
    gated_read_out_naive,
    {"r": "BTHK", "h": "BTHK", "e": "BTHK", "g_r": "HK", "g_h": "HK"},
    (1e-6,),
)
BOUNDS = (-2.0, -0.05)  # so narrow that values lie outside
DECAY = Pass(
    "decay_log",
    lambda *arguments: decay_log(*arguments[:-2], low=arguments[-2], high=arguments[-1]),
    decay_log_naive,
    {"logits": "BTD", "bias": "D", "context": "BTD", "context_bias": "D"},
    BOUNDS,
    wide_output=True,
)
SWIGLU = Pass("swiglu", swiglu, swiglu_naive, {"gate_up": "BTP"})
NORM = Pass(
    "rms_norm",
    rms_norm,
    rms_norm_naive,
    {"x": "BTD", "weight": "D"},
    (1e-6,),
    between=lambda inputs: [torch.randn_like(inputs[0]), torch.randn_like(inputs[0])],
)
HEADS = Pass(
    "head_decay",
    head_decay,
    head_decay_naive,
    {"x": "BTD", "w_alpha": "HD", "A_log": "H", "dt_bias": "H"},
    wide_output=True,
    between=lambda inputs: [operator("head_decay")(*inputs)[1]],
)
KERNELS = {
    "rms_norm": norm_kernels,
    "head_decay": head_kernels,
    "swiglu": swiglu_kernels,
    "memory_address": address_kernels,
    "gated_read_out": read_out_kernels,
    "decay_log": decay_kernels,
}
passes = pytest.mark.parametrize("one", [ADDRESS, READ_OUT, DECAY, SWIGLU, NORM, HEADS], ids=lambda one: one.name)
WIDE = INTERPRETED.resized(B=1, H=1, K=512, D=300, P=300)
everywhere = in_settings(
    [
        *((setting, time) for setting in (CPU, *CPU_LOW) for time in (1, 9)),
        *((setting, time) for setting in (INTERPRETED, INTERPRETED_LOW[0], WIDE) for time in (1, 13)),
        (INTERPRETED, 400),
        *((setting, time) for setting in (GPU, GPU_LOW[0], GPU_LOW[0].resized(K=512, D=4096, P=4096)) for time in (1, 700)),
    ]
)


@passes
@everywhere
def test_values_and_gradients(one: Pass, setting: Setting, time: int) -> None:
    inputs = one.draw(setting, time)
    outputs, gradients = one.run(one.op, inputs)
    expected, expected_gradients = one.run(one.naive, [tensor.double() for tensor in inputs])
    limit = TOLERANCE[setting.dtype]
    for actual, truth in zip([*outputs, *gradients], [*expected, *expected_gradients], strict=True):
        assert_same(actual, truth, limit=limit)
    assert [o.dtype for o in outputs] == [setting.wide if one.wide_output else setting.dtype] * len(outputs)
    assert all(o.is_contiguous() for o in outputs)
    assert [g.dtype for g in gradients] == [i.dtype for i in inputs]


@passes
@in_settings([(CPU, 3)])
def test_gradcheck(one: Pass, setting: Setting, time: int) -> None:
    inputs = tuple(tensor.requires_grad_() for tensor in one.draw(setting, time))
    assert torch.autograd.gradcheck(lambda *tensors: one.op(*tensors, *one.options), inputs)


@passes
@in_settings([(CPU, 3), (INTERPRETED, 3), (GPU, 3), (GPU_LOW[0], 3)])
def test_opcheck(one: Pass, setting: Setting, time: int) -> None:
    inputs = one.draw(setting, time)
    torch.library.opcheck(operator(one.name), (*(t.requires_grad_() for t in inputs), *one.options))
    inputs = [tensor.detach() for tensor in inputs]
    backward = one.backward_arguments(inputs)
    torch.library.opcheck(operator(f"{one.name}_bwd"), backward)
    gradients = as_list(operator(f"{one.name}_bwd")(*backward))
    torch.library.opcheck(operator(f"{one.name}_bwd_out"), (*backward, *(torch.full_like(g, float("nan")) for g in gradients)))


@passes
@in_settings([(CPU, 5), (INTERPRETED, 21), (GPU, 130), (GPU_LOW[0], 700)])
def test_views_of_one_buffer_in_and_out(one: Pass, setting: Setting, time: int) -> None:
    """Inputs are slices of a wider tensor, as HEM's parts are; gradients are written into slices, and nothing else is."""
    inputs = one.draw(setting, time)
    outputs, _ = one.run(one.op, inputs)
    backward = one.backward_arguments(inputs)
    expected = as_list(operator(f"{one.name}_bwd")(*backward))

    def sliced(tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        width = tensors[0][0, 0].numel()
        buffer = tensors[0].new_full((*tensors[0].shape[:2], len(tensors) * (width + 3)), float("nan"))
        views = [buffer[..., i * (width + 3) + 1 :][..., :width].unflatten(-1, tensors[0].shape[2:]) for i in range(len(tensors))]
        return buffer, views

    long = one.long
    _, views = sliced([inputs[i] for i in long])
    strided = list(inputs)
    for i, view in zip(long, views, strict=True):
        strided[i] = view.copy_(inputs[i])
    for actual, same in zip(one.run(one.op, strided)[0], outputs, strict=True):
        assert_same(actual, same)
    buffer, views = sliced([inputs[i] for i in long])
    written = [torch.full_like(tensor, float("nan")) for tensor in inputs]
    for i, view in zip(long, views, strict=True):
        written[i] = view
    before = backward[: len(backward) - len(inputs) - len(one.options)]
    operator(f"{one.name}_bwd_out")(*before, *strided, *one.options, *written)
    for actual, same in zip(written, expected, strict=True):
        assert_same(actual, same)
        actual.fill_(float("nan"))
    assert buffer.isnan().all()


@passes
@in_settings([(CPU, 4), (INTERPRETED, 4), (GPU, 4)])
def test_zero_vectors_have_finite_gradients(one: Pass, setting: Setting, time: int) -> None:
    outputs, gradients = one.run(one.op, [torch.zeros_like(tensor) for tensor in one.draw(setting, time)])
    assert all(tensor.isfinite().all() for tensor in (*outputs, *gradients))
    assert one in (DECAY, HEADS) or not any(output.any() for output in outputs)


@passes
def test_wrong_shapes_are_named(one: Pass) -> None:
    inputs = one.draw(CPU, 3)
    names = list(one.shapes)
    for i in range(1, len(inputs)):
        wrong = [tensor[..., :-1] if j == i else tensor for j, tensor in enumerate(inputs)]
        with pytest.raises(ValueError, match=f"{one.name}: {names[i]} has shape"):
            one.op(*wrong, *one.options)
    with pytest.raises(ValueError, match="T = 0"):
        one.op(*(tensor[:, :0] if i in one.long else tensor for i, tensor in enumerate(inputs)), *one.options)


@passes
@pytest.mark.parametrize("width", [20, 128, 512])
@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_compile(one: Pass, width: int, architecture: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = KERNELS[one.name]
    found: list[Any] = []
    monkeypatch.setattr(sums, "launch", lambda *_: None)
    monkeypatch.setattr(kernels, "launch", lambda kernel, tensors, prepare, *constants: found.append((kernel, tensors, prepare())))
    inputs = one.draw(CPU_LOW[1].resized(H=2, K=width, D=2 * width, P=2 * width), 4096)
    backward = one.backward_arguments(inputs)
    kernels.launch_forward(*inputs, *one.options)
    kernels.launch_backward(*backward, *(torch.empty_like(tensor) for tensor in inputs))
    assert len(found) == 2
    for kernel, tensors, call in found:
        shared = compiled_for(architecture, kernel, (*tensors, *call.numbers), call.named).metadata.shared
        assert shared <= SHARED_MEMORY[architecture]


@pytest.mark.parametrize("heads", [1, 32, 128, 512])
@pytest.mark.parametrize("architecture", [80, 90])
def test_any_number_of_heads_fits(heads: int, architecture: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(head_kernels, "launch", lambda kernel, tensors, prepare: found.append((kernel, tensors, prepare())))
    w_alpha, gate = torch.empty(heads, 4096), torch.empty(heads)
    head_kernels.launch_forward(torch.empty(1, 2048, 4096, dtype=torch.bfloat16), w_alpha, gate, gate)
    ((kernel, tensors, call),) = found
    assert compiled_for(architecture, kernel, (*tensors, *call.numbers), call.named).metadata.shared <= SHARED_MEMORY[architecture]


@in_settings([(CPU_LOW[0], 3), (INTERPRETED, 3), (GPU, 3)])
def test_log_decays_keep_their_digits(setting: Setting, time: int) -> None:
    """From 1e-6 a token to one part in a million a token, and without a context."""
    setting = setting.resized(B=1, D=200)
    logits = torch.linspace(-13, 13.5, 200).to(setting.device).expand(1, time, 200)
    log_gamma = decay_log(logits, torch.zeros(200, device=setting.device), low=-13.8, high=-1e-6)
    exact = torch.nn.functional.logsigmoid(logits.double()).clamp(-13.8, -1e-6)
    assert ((log_gamma.double() - exact) / exact).abs().max() < 1e-6


def test_a_context_without_its_bias_is_refused() -> None:
    logits = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="context and context_bias come together"):
        decay_log(logits, torch.zeros(3), logits, low=-1.0, high=0.0)


def test_an_odd_width_has_no_halves() -> None:
    with pytest.raises(ValueError, match="7 channels"):
        swiglu(torch.zeros(1, 2, 7))


@in_settings([(CPU, 5), (INTERPRETED, 11), (GPU, 700), (GPU_LOW[0].resized(D=4096), 700)])
def test_the_gradients_of_a_branch_meet_in_one_pass(setting: Setting, time: int) -> None:
    """Of both readers and of the stream; and of only some of them."""
    x, weight = NORM.draw(setting, time)
    cotangents = [torch.randn_like(x) for _ in range(3)]

    def gradients(function: Callable[..., Any], used: list[int], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_(), weight.detach().to(torch.promote_types(dtype, weight.dtype)).requires_grad_()]
        outputs = function(*leaves, 1e-6)
        return list(torch.autograd.grad([outputs[i] for i in used], leaves, [cotangents[i].to(dtype) for i in used], allow_unused=True))

    def naive(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        normed = rms_norm_naive(x, weight, eps)
        return normed, normed, x

    for used in ([0, 1, 2], [0, 2], [1], [2]):
        actual, expected = gradients(partial(rms_norm_branch, overwritten=True), used, x.dtype), gradients(naive, used, torch.float64)
        for ours, truth in zip(actual, expected, strict=True):
            assert (ours is None) == (truth is None)
            assert truth is None or ours is None or assert_same(ours, truth, limit=TOLERANCE[setting.dtype]) is None
    with torch.no_grad():
        found = rms_norm_branch(x, weight, 1e-6, overwritten=True)
        assert rms_norm_branch(x, weight, 1e-6).stream is x
    assert torch.equal(found.normed, rms_norm(x, weight, 1e-6))
    assert torch.equal(found.stream, x)
    assert found.owned == (setting.device == "cuda" or setting == INTERPRETED) == (found.stream.data_ptr() != x.data_ptr())
    torch.library.opcheck(rms_norm_with_copy, (x, weight, 1e-6))
    y = rms_norm_branch(x.requires_grad_(), weight, 1e-6)[0]
    with pytest.raises(RuntimeError, match="rms_norm_branch has no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@in_settings([(CPU, 1), (CPU_LOW[1], 5), (INTERPRETED, 1), (INTERPRETED, 13), (WIDE, 3), (GPU, 700), (GPU_LOW[0], 1), (GPU_LOW[0], 700)])
@pytest.mark.parametrize("carried", [True, False])
def test_planning_errors(setting: Setting, time: int, carried: bool) -> None:
    """The shift by a token within the kernels, tokens that do not count, and what was planned before the first."""
    sizes = setting.sizes
    updated, planned = (torch.randn(sizes["B"], time, sizes["D"] + 1).to(setting.device, setting.dtype)[..., 1:] for _ in range(2))
    first = torch.randn(sizes["B"], sizes["D"]).to(setting.device, setting.dtype) if carried else None
    counted = torch.rand(sizes["B"], time).to(setting.device) < 0.7
    results = []
    for function, dtype in ((planning_error, setting.dtype), (planning_error_naive, torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (updated, planned, first) if t is not None]
        total = function(*leaves[:2], leaves[2] if carried else None, counted)
        results.append([total, *torch.autograd.grad(0.25 * total, leaves)])
    for actual, truth in zip(*results, strict=True):
        assert_same(actual, truth, limit=TOLERANCE[setting.dtype])
    assert results[0][0].dtype == setting.wide
    assert not results[0][2][:, -1].any()
    arguments = (updated, planned, first, counted)
    torch.library.opcheck(
        operator("planning_error"), tuple(t.requires_grad_() if t is not None and t is not counted else t for t in arguments)
    )


@pytest.mark.parametrize("architecture", [80, 90])
def test_planning_kernels_compile(architecture: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(planning_kernels, "launch", lambda kernel, tensors, prepare, *constants: found.append((kernel, tensors, prepare())))
    updated, planned = torch.empty(2, 2, 4096, 300, dtype=torch.bfloat16)
    counted = torch.ones(2, 4096, dtype=torch.bool)
    for first in (None, updated[:, 0]):
        planning_kernels.launch_forward(updated, planned, first, counted)
        outputs = (torch.empty_like(updated), torch.empty_like(planned), torch.empty_like(planned[:, 0]))
        planning_kernels.launch_backward(torch.ones(()), updated, planned, first, counted, *outputs)
    assert len(found) == 4
    for kernel, tensors, call in found:
        assert compiled_for(architecture, kernel, (*tensors, *call.numbers), call.named).metadata.shared <= SHARED_MEMORY[architecture]
