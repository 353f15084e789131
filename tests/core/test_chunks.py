"""A sum over chunks is the sum, and keeps nothing of more than one of them."""

import pytest
import torch
from support import assert_same
from torch import Tensor

from mmrec.core.chunks import sum_over_chunks


@pytest.mark.parametrize(("rows", "size", "calls"), [(11, 4, 6), (8, 4, 4), (4, 4, 1), (3, 4, 1), (0, 4, 1)])
def test_it_is_the_sum_and_so_are_its_gradients(rows: int, size: int, calls: int) -> None:
    """Each of several chunks is computed twice, the second time for its gradients; a single one once."""
    x, counted = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True), torch.rand(rows) < 0.5
    weight = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    seen: list[int] = []

    def function(x: Tensor, counted: Tensor) -> Tensor:
        seen.append(len(x))
        return torch.where(counted, (x @ weight).logsumexp(-1), 0).sum()

    total = sum_over_chunks(function, x, counted, size=size)
    found = torch.autograd.grad(total, [x, weight])
    assert (len(seen), max(seen)) == (calls, min(rows, size))
    expected = function(x, counted)
    assert_same(total, expected)
    for actual, truth in zip(found, torch.autograd.grad(expected, [x, weight]), strict=True):
        assert_same(actual, truth)


def test_tensors_of_other_numbers_of_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        sum_over_chunks(lambda x, y: x.sum() + y.sum(), torch.ones(8), torch.ones(4), size=4)
