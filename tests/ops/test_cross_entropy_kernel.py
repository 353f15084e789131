"""The loss's kernel, interpreted: the same loss and gradients as the plain form, over several blocks of the vocabulary."""

import pytest
import torch
from support import RecordedOperators, assert_same, relative_error

from mmrec.core import cross_entropy_kernels
from mmrec.core.cross_entropy import linear_cross_entropy, linear_cross_entropy_naive

pytestmark = pytest.mark.interpreted


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy_kernels, "BLOCK", 16)


@pytest.mark.parametrize("vocabulary", [11, 16, 53])
@pytest.mark.parametrize("chunk", [1, 5, 9, 100])
def test_loss_and_gradients(vocabulary: int, chunk: int, poisoned_memory: None) -> None:
    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(vocabulary, 8, requires_grad=True)
    labels = torch.randint(-1, vocabulary, (9,))
    labels[3] = -1
    with RecordedOperators() as recorded:
        loss, count = linear_cross_entropy(hidden, weight, labels, chunk)
    assert recorded.names == ["linear_cross_entropy"]
    expected, expected_count = linear_cross_entropy_naive(hidden, weight, labels, chunk)
    assert count == expected_count
    assert_same(loss, expected)
    gradients = torch.autograd.grad(3 * loss, (hidden, weight))
    for actual, wanted in zip(gradients, torch.autograd.grad(3 * expected, (hidden, weight)), strict=True):
        assert_same(actual, wanted)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, labels, chunk)[0], loss)


@pytest.mark.parametrize("learning", [(True, False), (False, True)])
def test_only_the_gradients_that_are_wanted(learning: tuple[bool, bool]) -> None:
    leaves = [torch.randn(n, 8, requires_grad=wanted) for n, wanted in zip((9, 11), learning, strict=True)]
    labels = torch.randint(11, (9,))
    linear_cross_entropy(*leaves, labels, 4)[0].backward()
    actual = [leaf.grad for leaf in leaves]
    assert [gradient is not None for gradient in actual] == list(learning)
    (leaf,) = [leaf for leaf in leaves if leaf.requires_grad]
    (wanted,) = torch.autograd.grad(linear_cross_entropy_naive(*leaves, labels, 4)[0], leaf)
    assert_same(leaf.grad, wanted)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_summed_in_fp32(autocast: bool) -> None:
    """The weight's gradient over 40 chunks: kept in bf16 between them it would be off by percents."""
    hidden, weight = torch.randn(200, 8), torch.randn(29, 8)
    labels = torch.randint(29, (200,))
    dtype = torch.float32 if autocast else torch.bfloat16
    leaves = [tensor.bfloat16().to(dtype).requires_grad_() for tensor in (hidden, weight)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = linear_cross_entropy(*leaves, labels, 5)
    truth, _ = linear_cross_entropy(*exact, labels, 5)
    assert loss.dtype == torch.float32
    assert relative_error(loss, truth) < 1e-3
    for actual, wanted, leaf in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, exact), leaves, strict=True):
        assert actual.dtype == leaf.dtype
        assert relative_error(actual, wanted) < 6e-3


def test_no_label_gives_zero_and_a_wrong_one_nan() -> None:
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    loss, count = linear_cross_entropy(hidden, weight, torch.full((4,), -1), 2)
    loss.backward()
    assert loss == count == 0
    assert torch.equal(hidden.grad, torch.zeros(4, 8))
    assert linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 11, 3]), 2)[0].isnan()


def test_large_logits_and_infinities() -> None:
    hidden, labels = torch.eye(4), torch.tensor([0, 1, 2, 3])
    weight = torch.tensor([[3e4, -3e4, 0, 88], [0, 1e4, 0, 0], [0, 0, -3e4, 0], [1, 2, 3, 4.0]])
    assert_same(linear_cross_entropy(hidden, weight, labels, 4)[0], linear_cross_entropy_naive(hidden, weight, labels, 4)[0])
    weight[1, 0] = float("nan")
    assert linear_cross_entropy(hidden, weight, labels, 4)[0].isnan()


def test_the_fake_promises_what_comes() -> None:
    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    operator = torch.ops.mmrec.linear_cross_entropy.default
    for wanted in ((True, True), (True, False), (False, False)):
        torch.library.opcheck(operator, (hidden, weight, torch.randint(11, (9,)), 4, torch.float32, *wanted))
