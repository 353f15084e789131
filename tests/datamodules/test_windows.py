import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.windows import EndlessBatches, ValidationBatches


class Numbers:
    """Window i is the number i."""

    def __init__(self, num_windows: int) -> None:
        self.num_windows = num_windows

    def batch(self, windows: np.ndarray) -> dict[str, Any]:
        assert windows.min() >= 0
        assert windows.max() < self.num_windows
        return {"input_ids": windows[:, None].copy()}


def _rows(batch: dict[str, torch.Tensor]) -> list[int]:
    return batch["input_ids"].flatten().tolist()


def _all_rows(batches: Iterable[dict[str, torch.Tensor]]) -> list[int]:
    return list(itertools.chain.from_iterable(map(_rows, batches)))


def _endless(
    rank: int = 0, world_size: int = 1, batch_size: int = 4, size: int = 50, shuffle: bool = True, seed: int = 1
) -> EndlessBatches:
    return EndlessBatches(Numbers(size), batch_size, rank=rank, world_size=world_size, seed=seed, shuffle=shuffle)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_ranks_together_see_the_same_batches_whatever_their_number(world_size: int) -> None:
    one = _endless(batch_size=8)
    ranks = [_endless(rank, world_size, 8 // world_size) for rank in range(world_size)]
    for number in range(20):
        assert _all_rows(rank.batch(number) for rank in ranks) == _rows(one.batch(number))


def test_each_epoch_has_every_window_once_in_another_order() -> None:
    iterator = iter(_endless(batch_size=5))
    epochs = [_all_rows(next(iterator) for _ in range(10)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(50))
    other = iter(_endless(batch_size=5, seed=2))
    assert _all_rows(next(other) for _ in range(10)) != epochs[0]


def test_a_batch_may_reach_into_the_next_epoch() -> None:
    iterator = iter(_endless(batch_size=7, size=10, shuffle=False))
    assert [_rows(next(iterator)) for _ in range(2)] == [[0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 0, 1, 2, 3]]


@pytest.mark.parametrize(("world_size", "max_batches"), [(1, None), (2, None), (2, 3), (3, 2)])
def test_validation_is_disjoint_and_of_equal_length_on_all_ranks(world_size: int, max_batches: int | None) -> None:
    ranks = [ValidationBatches(Numbers(50), 4, rank=rank, world_size=world_size, max_batches=max_batches) for rank in range(world_size)]
    batches = [list(rank) for rank in ranks]
    assert {len(rank) for rank in ranks} == {len(found) for found in batches} == {max_batches or -(-(50 // world_size) // 4)}
    seen = sorted(_all_rows(itertools.chain(*batches)))
    assert seen == list(range(len(seen)))
    assert len(seen) == (50 // world_size * world_size if max_batches is None else max_batches * 4 * world_size)


def test_too_few_validation_windows_for_the_ranks() -> None:
    with pytest.raises(ValueError, match=r"^validation has 3 windows, too few for 4 ranks"):
        ValidationBatches(Numbers(3), 4, rank=0, world_size=4, max_batches=None)
