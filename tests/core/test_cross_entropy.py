"""The chunked loss equals the plain one, ignores what is to be ignored, and never holds all logits."""

import torch
import torch.nn.functional as F
from support import assert_same

from mmrec.core.cross_entropy import linear_cross_entropy


def test_equals_cross_entropy_of_all_logits() -> None:
    hidden = torch.randn(23, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(-1, 11, (23,))
    expected = F.cross_entropy(hidden @ weight.T, labels, ignore_index=-1)
    expected_grads = torch.autograd.grad(expected, (hidden, weight))
    for chunk in (1, 5, 23, 100):
        loss, count = linear_cross_entropy(hidden, weight, labels, chunk)
        assert count == (labels != -1).sum()
        assert_same(loss, expected)
        for actual, wanted in zip(torch.autograd.grad(loss, (hidden, weight)), expected_grads, strict=True):
            assert_same(actual, wanted)


def test_nothing_to_learn_gives_zero_and_a_zero_gradient() -> None:
    hidden = torch.randn(4, 8, requires_grad=True)
    loss, count = linear_cross_entropy(hidden, torch.randn(11, 8), torch.full((4,), -1), 2)
    loss.backward()
    assert loss == 0
    assert count == 0
    assert torch.equal(hidden.grad, torch.zeros(4, 8))


def test_logits_exist_a_chunk_at_a_time() -> None:
    hidden, weight, labels = torch.randn(64, 8, requires_grad=True), torch.randn(500, 8, requires_grad=True), torch.randint(500, (64,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss, _ = linear_cross_entropy(hidden, weight, labels, 16)
    assert max(kept) <= max(weight.numel(), hidden.numel())
    assert sum(n >= 16 * 500 for n in kept if n != weight.numel()) == 0
    loss.backward()
    assert hidden.grad is not None


def test_bf16_logits_are_summed_in_fp32() -> None:
    hidden, weight, labels = torch.randn(64, 8).bfloat16(), torch.randn(500, 8).bfloat16(), torch.randint(500, (64,))
    loss, _ = linear_cross_entropy(hidden, weight, labels, 16)
    assert loss.dtype == torch.float32
    assert_same(loss, F.cross_entropy(hidden.float() @ weight.float().T, labels), limit=5e-3)
