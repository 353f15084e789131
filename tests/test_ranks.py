"""What each rank says, all know in the same order."""

import torch.distributed as dist
from ranks import run_ranks

from mmrec.ranks import gathered


def on_a_rank() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    assert gathered({"rank": rank, "more": "x" * 100 * rank}) == [{"rank": 0, "more": ""}, {"rank": 1, "more": "x" * 100}]


def test_all_ranks_get_what_each_has_in_their_order() -> None:
    assert run_ranks(on_a_rank, 2) == [0, 0]


def alone_in_a_group() -> None:
    dist.init_process_group("gloo")
    test_one_process_asks_nobody()


def test_a_group_of_one_asks_nobody() -> None:
    assert run_ranks(alone_in_a_group, 1) == [0]


def test_one_process_asks_nobody() -> None:
    value = object()
    [found] = gathered(value)
    assert found is value
