"""Warm-up and cosine at the points that define them."""

import types

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from lightning_modules.schedules import linear_change, warmup_cosine


def test_warm_up_is_linear_and_starts_above_zero() -> None:
    factor = warmup_cosine(4, 100, 0.1)
    assert [factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_the_cosine_passes_its_middle_and_ends_at_the_minimum() -> None:
    factor = warmup_cosine(10, 110, 0.2)
    assert factor(60) == pytest.approx(0.6)
    assert factor(110) == pytest.approx(0.2)
    assert factor(10_000) == pytest.approx(0.2)
    values = [factor(step) for step in range(10, 111)]
    assert values == sorted(values, reverse=True)


def test_no_warm_up_and_no_room_for_a_decay() -> None:
    assert warmup_cosine(0, 10, 0.1)(0) == 1.0
    assert warmup_cosine(10, 5, 0.1)(9) == 1.0
    assert warmup_cosine(10, 5, 0.1)(11) == pytest.approx(0.1)


def test_the_schedule_stays_out_of_the_checkpoint() -> None:
    """LambdaLR stores the attributes of callable objects, so a resumed run would keep the old run's schedule."""
    factor = warmup_cosine(4, 100, 0.1)
    assert isinstance(factor, types.FunctionType)
    scheduler = LambdaLR(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), factor)
    assert scheduler.state_dict()["lr_lambdas"] == [None]


def test_linear_change() -> None:
    assert [linear_change(1.0, 3.0, 4, step) for step in (0, 1, 2, 4, 9)] == [1.0, 1.5, 2.0, 3.0, 3.0]
    assert linear_change(1.0, 3.0, 0, 0) == 3.0
