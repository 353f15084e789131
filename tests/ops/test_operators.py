"""Each operator against its naive loop: values, every gradient, splitting, packing, stepping.

The same tests run the PyTorch form in float64, the kernels through Triton's interpreter (`-m interpreted`) and on a GPU (`-m gpu`).
"""

import itertools

import pytest
import torch
from cases import (
    CPU,
    CPU_LOW,
    GATES,
    GPU,
    GPU_LOW,
    GPU_NARROW,
    INTERPRETED,
    INTERPRETED_LOW,
    Case,
    Setting,
    by_name,
    everywhere,
    gradients,
    in_float64,
    in_settings,
    with_reset,
)
from support import TOLERANCE, assert_same
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned_memory")
TIMES = [1, 7, 130]
LONG = 2049


def assert_equal_to_the_loop(case: Case, setting: Setting, inputs: dict[str, Tensor], reset: Tensor | None, gates: str) -> None:
    outputs, grads = gradients(case.op, inputs, reset)
    expected_outputs, expected_grads = gradients(case.naive, in_float64(inputs), reset)
    assert outputs[0].dtype == inputs[case.sequence[0]].dtype
    assert outputs[1].dtype == setting.wide
    for actual, expected, limit in zip(outputs, expected_outputs, case.output_limits(setting), strict=True):
        assert_same(actual, expected, limit=limit, what="output")
    for name in inputs:
        assert grads[name].dtype == inputs[name].dtype
        assert_same(grads[name], expected_grads[name], limit=case.gradient_limit(setting, gates, name), what=f"gradient to {name}")


@by_name
@pytest.mark.parametrize("gates", GATES)
@in_settings(
    [
        *((CPU, time) for time in TIMES),
        *((INTERPRETED, time) for time in (1, 7, 50)),
        *((setting, 70) for setting in CPU_LOW),
        *((setting, time) for setting in (GPU, *GPU_LOW) for time in (*TIMES, LONG)),
        (GPU_NARROW, 4 * LONG),
    ]
)
def test_values_and_gradients_equal_the_naive_loop(case: Case, setting: Setting, time: int, gates: str) -> None:
    assert_equal_to_the_loop(case, setting, case.draw(setting, time, gates), case.reset(setting, time), gates)


@by_name
@in_settings([(setting, 21) for setting in INTERPRETED_LOW])
def test_inputs_of_low_precision(case: Case, setting: Setting, time: int) -> None:
    assert_equal_to_the_loop(case, setting, case.draw(setting, time), case.reset(setting, time), "ordinary")


@by_name
@in_settings([(CPU, 9), (INTERPRETED, 19), (GPU, 130)])
def test_without_an_initial_state(case: Case, setting: Setting, time: int) -> None:
    inputs = case.draw(setting, time)
    inputs.pop(case.state)
    assert_equal_to_the_loop(case, setting, inputs, None, "ordinary")


@by_name
@pytest.mark.parametrize("used", [0, 1], ids=["output", "last state"])
@in_settings([(CPU, 9), (INTERPRETED, 19), (GPU, 130)])
def test_one_result_used_and_the_other_not(case: Case, setting: Setting, time: int, used: int) -> None:
    """The cotangent of the unused one is missing, and a sum's is a single number seen through strides of zero."""
    inputs, reset = case.draw(setting, time), case.reset(setting, time, 0.05)
    actual, actual_grads = gradients(lambda **leaves: (case.op(**leaves)[used].sum(),), inputs, reset)
    expected, expected_grads = gradients(lambda **leaves: (case.naive(**leaves)[used].sum(),), in_float64(inputs), reset)
    # A sum of terms of both signs: the table's tolerance holds for the terms.
    assert_same(actual[0], expected[0], limit=10 * case.gradient_limit(setting))
    for name in inputs:
        if expected_grads[name] is not None:
            assert_same(
                grads_or_zero(actual_grads[name], inputs[name]), expected_grads[name], limit=case.gradient_limit(setting), what=name
            )


def grads_or_zero(gradient: Tensor | None, tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if gradient is None else gradient


@by_name
def test_gradcheck(case: Case) -> None:
    inputs = {name: tensor.requires_grad_() for name, tensor in case.draw(CPU, 5).items()}
    names = list(inputs)
    assert torch.autograd.gradcheck(lambda *tensors: case.op(**dict(zip(names, tensors, strict=True))), tuple(inputs.values()))


@by_name
@pytest.mark.parametrize("cut", [1, 64, -1])
@in_settings([(CPU, 70), (INTERPRETED, 40), (GPU, 700), (GPU_LOW[0], 700)])
def test_split_and_carried_equals_whole(case: Case, setting: Setting, time: int, cut: int) -> None:
    inputs = case.draw(setting, time)
    cut = cut if cut < time else time // 2

    def in_two(**leaves: Tensor) -> tuple[Tensor, Tensor]:
        rest = {name: leaves[name] for name in case.constant}
        first = {name: leaves[name][:, :cut] for name in case.sequence}
        second = {name: leaves[name][:, cut:] for name in case.sequence}
        head, state = case.op(**first, **rest, **{case.state: leaves[case.state]})
        tail, last = case.op(**second, **rest, **{case.state: state})
        return torch.cat([head, tail], dim=1), last

    outputs, grads = gradients(case.op, inputs)
    split_outputs, split_grads = gradients(in_two, inputs)
    for actual, expected, limit in zip(split_outputs, outputs, case.output_limits(setting), strict=True):
        assert_same(actual, expected, limit=limit)
    for name in inputs:
        assert_same(split_grads[name], grads[name], limit=case.gradient_limit(setting), what=f"gradient to {name}")


@with_reset
@in_settings([(CPU, 100), (INTERPRETED, 50), (GPU, 700), (GPU_LOW[0], 700)])
def test_packed_equals_document_by_document(case: Case, setting: Setting, time: int) -> None:
    inputs = case.draw(setting, time)
    starts = [0, 1, 2 * time // 5, 16 * (time // 25), time - 3, time]
    reset = torch.zeros(setting.sizes["B"], time, dtype=torch.bool, device=setting.device)
    reset[:, starts[1:-1]] = True

    def one_by_one(**leaves: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        constant = {name: leaves[name] for name in case.constant}
        for begin, end in itertools.pairwise(starts):
            document = {name: leaves[name][:, begin:end] for name in case.sequence}
            state = {case.state: leaves[case.state]} if begin == 0 else {}
            alone, alone_last = case.op(**document, **constant, **state)
            outputs.append(alone)
        return torch.cat(outputs, dim=1), alone_last

    outputs, grads = gradients(case.op, inputs, reset)
    expected_outputs, expected_grads = gradients(one_by_one, inputs)
    for actual, expected, limit in zip(outputs, expected_outputs, case.output_limits(setting), strict=True):
        assert_same(actual, expected, limit=limit)
    for name in inputs:
        assert_same(grads[name], expected_grads[name], limit=case.gradient_limit(setting), what=f"gradient to {name}")


@by_name
@in_settings([(CPU, 6), (INTERPRETED, 6), (GPU, 70), (GPU_LOW[0], 70)])
def test_steps_equal_the_scan(case: Case, setting: Setting, time: int) -> None:
    inputs = case.draw(setting, time)
    whole, last = case.op(**inputs)
    outputs, state = [], inputs[case.state]
    for t in range(time):
        token = {name: inputs[name][:, t : t + 1] for name in case.sequence}
        output, state = case.op(**token, **{name: inputs[name] for name in case.constant}, **{case.state: state})
        outputs.append(output)
    for actual, expected, limit in zip((torch.cat(outputs, 1), state), (whole, last), case.output_limits(setting), strict=True):
        assert_same(actual, expected, limit=limit)


def every_second_element(buffer: Tensor, width: int) -> Tensor:
    return buffer[..., 1 : 1 + 2 * width : 2]


def odd_offset(buffer: Tensor, width: int) -> Tensor:
    return buffer[..., 3 : 3 + width]


def reversed_dimensions(buffer: Tensor, width: int) -> Tensor:
    """Time (or channels, where there is no time) outermost in memory."""
    return buffer[..., 3 : 3 + width].transpose(0, 1).contiguous().transpose(0, 1) if buffer.ndim > 1 else buffer[3 : 3 + width]


@by_name
@pytest.mark.parametrize("layout", [every_second_element, odd_offset, reversed_dimensions])
@in_settings([(CPU, 9), (INTERPRETED, 19), (GPU, 130), (GPU_LOW[0], 130)])
def test_strided_inputs(case: Case, setting: Setting, time: int, layout) -> None:
    inputs = case.draw(setting, time)
    buffers = {}
    for name, tensor in inputs.items():
        buffers[name] = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), float("nan"), dtype=tensor.dtype, device=tensor.device)
        selected = torch.arange(buffers[name].shape[-1], device=tensor.device).expand_as(buffers[name])
        chosen = torch.zeros_like(buffers[name], dtype=torch.bool).scatter(-1, layout(selected, tensor.shape[-1]), True)
        buffers[name].masked_scatter_(chosen, tensor)
    widths = {name: tensor.shape[-1] for name, tensor in inputs.items()}
    outputs, grads = gradients(lambda **leaves: case.op(**{name: layout(leaf, widths[name]) for name, leaf in leaves.items()}), buffers)
    expected_outputs, expected_grads = gradients(case.op, inputs)
    for actual, expected in zip(outputs, expected_outputs, strict=True):
        assert_same(actual, expected)
    for name in inputs:
        assert_same(layout(grads[name], widths[name]), expected_grads[name], what=f"gradient to {name}")


@by_name
@in_settings([(CPU_LOW[0], 70), (INTERPRETED, 21), (GPU, 130)])
def test_autocast_changes_nothing(case: Case, setting: Setting, time: int) -> None:
    """States are fp32; a matrix product under autocast would carry the memory on in bf16."""
    inputs = case.draw(setting, time)
    outputs, grads = gradients(case.op, inputs)
    autocast_outputs, autocast_grads = gradients(case.op, inputs, autocast=True)
    naive_outputs, _ = gradients(case.naive, inputs, autocast=True)
    for actual, naive, expected in zip(autocast_outputs, naive_outputs, outputs, strict=True):
        assert torch.equal(actual, expected)
        assert_same(naive, expected)
    assert all(torch.equal(autocast_grads[name], grads[name]) for name in inputs)


@by_name
@everywhere
def test_no_future_token_changes_a_past_output(case: Case, setting: Setting, time: int) -> None:
    inputs = case.draw(setting, time)
    before, _ = case.op(**inputs)
    changed = {name: tensor.clone() for name, tensor in inputs.items()}
    begin = time - 20
    for name in case.sequence:
        changed[name][:, begin:] = case.draw(setting, 20)[name]
    after, _ = case.op(**changed)
    if case.name.startswith("gated_scan") and setting.dtype != torch.float64:
        # A tile of Newton's iteration ends when its worst token has converged: later ones decide about the last bits.
        assert_same(before[:, :begin], after[:, :begin], limit=TOLERANCE[setting.dtype] / 10)
    else:
        assert torch.equal(before[:, :begin], after[:, :begin])
    assert not torch.equal(before[:, begin:], after[:, begin:])


@by_name
def test_no_tokens_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match=f"{case.name}: T = 0"):
        case.op(**case.draw(CPU, 0))


@by_name
def test_a_wrong_state_is_refused(case: Case) -> None:
    inputs = case.draw(CPU, 3)
    inputs[case.state] = inputs[case.state][:1]
    with pytest.raises(ValueError, match=rf"{case.name}: {case.state} has shape .* must be"):
        case.op(**inputs)


@with_reset
def test_a_reset_mask_of_numbers_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match="reset has dtype"):
        case.op(**case.draw(CPU, 3), reset=torch.zeros(2, 3))
