"""What is read off curves."""

import math

import numpy as np
import pytest

from mmrec.studies.statistics import detrended_variance, smoothed, steps_to, sure_errors


def test_steps_to_a_loss_lie_between_two_points() -> None:
    curve = [(0, 10.0), (100, 6.0), (200, 5.0), (300, 5.5), (400, 4.0)]
    assert steps_to(curve, 5.5) == 150
    assert steps_to(curve, 5.0) == 200
    assert steps_to(curve, 4.75) == 350
    assert steps_to(curve, 10.0) == 0
    assert steps_to(curve, 3.9) is None
    assert steps_to([], 1.0) is None


def test_a_trend_is_no_variance_and_noise_is() -> None:
    steps = np.arange(2000)
    trend = 3 + 5 * np.exp(-steps / 400)
    noise = np.random.default_rng(0).normal(0, 0.1, len(steps))
    assert detrended_variance(trend.tolist()) < 1e-5
    # The moving mean takes 1/81 of the noise along.
    assert detrended_variance((trend + noise).tolist()) == pytest.approx(0.01 * (1 - 1 / 81), rel=0.08)
    assert detrended_variance([1.0] * 49) is None


def test_the_first_tenth_is_left_out() -> None:
    values = [8.0 + (-1) ** step for step in range(50)] + [2.0] * 950
    assert detrended_variance(values) < 1e-3


def test_a_smoothed_curve_is_of_means_at_their_middle() -> None:
    assert smoothed([1.0, 3.0, 5.0, 7.0], points=2) == [(1, 2.0), (3, 6.0)]
    assert smoothed([1.0, 2.0], points=10) == [(0, 1.0), (1, 2.0)]
    assert len(smoothed([0.0] * 12345)) == 100


@pytest.mark.parametrize("groups", [2, 3, 4, 11, 12, 26, 50, 200])
def test_sure_errors_leave_out_a_twentieth_of_students_distribution(groups: int) -> None:
    """Its density integrated: with t = √ν tan θ it is proportional to cos(θ)^(ν − 1)."""
    freedom = groups - 1
    angles = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    inside = density[angles <= math.atan(sure_errors(groups) / math.sqrt(freedom))].sum() / density.sum()
    assert inside == pytest.approx(0.95, abs=3e-4)
