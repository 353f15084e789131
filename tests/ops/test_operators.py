"""Each operator against its naive loop: values, every gradient, splitting, packing, stepping."""

import itertools

import pytest
import torch
from cases import CASES, GATES, WITH_RESET, B, Case, random_reset
from support import assert_same
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned_memory")
by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
with_reset = pytest.mark.parametrize("case", WITH_RESET, ids=lambda case: case.name)


def gradients(
    function, inputs: dict[str, Tensor], reset: Tensor | None = None, autocast: bool = False
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and the gradient of a random projection of *both* outputs to every input."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = function(**leaves) if reset is None else function(**leaves, reset=reset)
    generator = torch.Generator().manual_seed(1)
    projections = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    sum((o * w).sum() for o, w in zip(outputs, projections, strict=True)).backward()
    return list(outputs), {name: leaf.grad for name, leaf in leaves.items()}


@by_name
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("time", [1, 7, 130])
def test_values_and_gradients_equal_the_naive_loop(case: Case, time: int, gates: str) -> None:
    inputs = case.draw(time, gates=gates)
    reset = random_reset(time) if case.has_reset else None
    outputs, grads = gradients(case.op, inputs, reset)
    expected_outputs, expected_grads = gradients(case.naive, inputs, reset)
    for actual, expected in zip(outputs, expected_outputs, strict=True):
        assert_same(actual, expected, what="output")
    for name in inputs:
        # The chunked form sums differences of cumulative logs: a gradient of 1e-4 is what remains of terms of order 1.
        cancels = case.name == "memory_scan" and gates == "near 0" and name == "log_alpha"
        assert_same(grads[name], expected_grads[name], limit=1e-10 if cancels else None, what=f"gradient to {name}")


@by_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs_against_float64(case: Case, dtype: torch.dtype) -> None:
    inputs = case.draw(70, dtype)
    outputs, grads = gradients(case.op, inputs)
    expected_outputs, expected_grads = gradients(case.naive, {name: tensor.double() for name, tensor in inputs.items()})
    assert outputs[0].dtype == (dtype if case.name != "exp_product_scan" else torch.float32)
    assert outputs[1].dtype == torch.float32
    for actual, expected in zip(outputs, expected_outputs, strict=True):
        assert_same(actual, expected)
    for name in inputs:
        assert grads[name].dtype == inputs[name].dtype
        assert_same(grads[name], expected_grads[name], dtype, what=f"gradient to {name}")


@by_name
def test_without_an_initial_state(case: Case) -> None:
    inputs = case.draw(9)
    inputs.pop(case.state)
    for actual, expected in zip(case.op(**inputs), case.naive(**inputs), strict=True):
        assert_same(actual, expected)


@by_name
def test_gradcheck(case: Case) -> None:
    inputs = {name: tensor.requires_grad_() for name, tensor in case.draw(5).items()}
    names = list(inputs)
    assert torch.autograd.gradcheck(lambda *tensors: case.op(**dict(zip(names, tensors, strict=True))), tuple(inputs.values()))


@by_name
@pytest.mark.parametrize("cut", [1, 64, 69])
def test_split_and_carried_equals_whole(case: Case, cut: int) -> None:
    inputs = case.draw(70)

    def in_two(**leaves: Tensor) -> tuple[Tensor, Tensor]:
        rest = {name: leaves[name] for name in case.constant}
        first = {name: leaves[name][:, :cut] for name in case.sequence}
        second = {name: leaves[name][:, cut:] for name in case.sequence}
        head, state = case.op(**first, **rest, **{case.state: leaves[case.state]})
        tail, last = case.op(**second, **rest, **{case.state: state})
        return torch.cat([head, tail], dim=1), last

    outputs, grads = gradients(case.op, inputs)
    split_outputs, split_grads = gradients(in_two, inputs)
    for actual, expected in zip(split_outputs, outputs, strict=True):
        assert_same(actual, expected)
    for name in inputs:
        assert_same(split_grads[name], grads[name], what=f"gradient to {name}")


@with_reset
def test_packed_equals_document_by_document(case: Case) -> None:
    inputs = case.draw(100)
    starts = [0, 1, 40, 64, 97, 100]
    reset = torch.zeros(B, 100, dtype=torch.bool)
    reset[:, starts[1:-1]] = True
    packed, last = case.op(**inputs, reset=reset)
    constant = {name: inputs[name] for name in case.constant}
    for begin, end in itertools.pairwise(starts):
        document = {name: inputs[name][:, begin:end] for name in case.sequence}
        state = {case.state: inputs[case.state]} if begin == 0 else {}
        alone, alone_last = case.op(**document, **constant, **state)
        assert_same(packed[:, begin:end], alone, what=f"document at {begin}")
    assert_same(last, alone_last)


@by_name
def test_steps_equal_the_scan(case: Case) -> None:
    inputs = case.draw(6)
    whole, last = case.op(**inputs)
    state = inputs[case.state]
    for t in range(6):
        token = {name: inputs[name][:, t : t + 1] for name in case.sequence}
        output, state = case.op(**token, **{name: inputs[name] for name in case.constant}, **{case.state: state})
        assert_same(output[:, 0], whole[:, t])
    assert_same(state, last)


@by_name
def test_strided_inputs(case: Case) -> None:
    inputs = case.draw(9)
    strided = {}
    for name, tensor in inputs.items():
        buffer = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), float("nan"), dtype=tensor.dtype)
        view = buffer[..., 1 : 1 + 2 * tensor.shape[-1] : 2]
        view.copy_(tensor)
        strided[name] = view
    for actual, expected in zip(case.op(**strided), case.op(**inputs), strict=True):
        assert_same(actual, expected)


@by_name
def test_autocast_changes_nothing(case: Case) -> None:
    """States are fp32; a matrix product under autocast would carry the memory on in bf16."""
    inputs = case.draw(70, torch.float32)
    outputs, grads = gradients(case.op, inputs)
    autocast_outputs, autocast_grads = gradients(case.op, inputs, autocast=True)
    naive_outputs, _ = gradients(case.naive, inputs, autocast=True)
    for actual, naive, expected in zip(autocast_outputs, naive_outputs, outputs, strict=True):
        assert torch.equal(actual, expected)
        assert_same(naive, expected)
    assert all(torch.equal(autocast_grads[name], grads[name]) for name in inputs)


@by_name
def test_no_future_token_changes_a_past_output(case: Case) -> None:
    inputs = case.draw(70)
    before, _ = case.op(**inputs)
    changed = {name: tensor.clone() for name, tensor in inputs.items()}
    for name in case.sequence:
        changed[name][:, 50:] = case.draw(20)[name]
    after, _ = case.op(**changed)
    assert torch.equal(before[:, :50], after[:, :50])
    assert not torch.equal(before[:, 50:], after[:, 50:])


@by_name
def test_no_tokens_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match=f"{case.name}: T = 0"):
        case.op(**case.draw(0))


@by_name
def test_a_wrong_state_is_refused(case: Case) -> None:
    inputs = case.draw(3)
    inputs[case.state] = inputs[case.state][:1]
    with pytest.raises(ValueError, match=rf"{case.name}: {case.state} has shape .* must be"):
        case.op(**inputs)


@with_reset
def test_a_reset_mask_of_numbers_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match="reset has dtype"):
        case.op(**case.draw(3), reset=torch.zeros(B, 3))
