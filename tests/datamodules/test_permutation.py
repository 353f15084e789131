import numpy as np
import pytest

from datamodules.permutation import Permutation


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_every_element_exactly_once(size: int) -> None:
    elements = Permutation(size, seed=3, epoch=2)(np.arange(size))
    assert sorted(elements.tolist()) == list(range(size))


def test_seed_and_epoch_choose_the_order() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return Permutation(500, seed, epoch)(np.arange(500)).tolist()

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_the_order_looks_shuffled() -> None:
    size = 20_000
    elements = Permutation(size, seed=0)(np.arange(size)).astype(np.float64)
    # Neighbours and positions are uncorrelated: |r| of 20,000 independent pairs stays below 0.035 in all but one of a million cases.
    assert abs(np.corrcoef(elements[:-1], elements[1:])[0, 1]) < 0.035
    assert abs(np.corrcoef(elements, np.arange(size))[0, 1]) < 0.035


def test_it_is_the_same_on_every_machine() -> None:
    assert Permutation(1000, seed=1, epoch=1)(np.arange(6)).tolist() == [111, 577, 472, 462, 673, 291]


def test_huge_sizes_need_no_table() -> None:
    elements = Permutation(10**15, seed=5)(np.arange(1000))
    assert len(set(elements.tolist())) == 1000
    assert elements.max() < 10**15
