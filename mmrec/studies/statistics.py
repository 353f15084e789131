"""What is read off losses: steps to one, their variance about a trend, means of samples that come in groups."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Curve = Sequence[tuple[int, float]]
_TREND = 0.02  # of the steps: half the width of the moving mean that is taken for the trend
_SKIPPED = 0.1  # of the steps, at the start, where the loss falls too fast to have a variance
# Student's t that is exceeded, in size, with a probability of 5 %, by degrees of freedom: Abramowitz & Stegun, table 26.10.
_STUDENT = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228, 12: 2.179, 15: 2.131, 20: 2.086,
    30: 2.042, 60: 2.000, math.inf: 1.960,
}  # fmt: skip


def steps_to(curve: Curve, loss: float) -> float | None:
    """The step at which a curve first reaches `loss`, between two of its points by interpolation; None where it does not."""
    previous: tuple[int, float] | None = None
    for step, value in curve:
        if value <= loss:
            if previous is None:
                return float(step)
            share = (previous[1] - loss) / (previous[1] - value)
            return previous[0] + share * (step - previous[0])
        previous = (step, value)
    return None


def detrended_variance(losses: Sequence[float]) -> float | None:
    """Variance of per-step losses about their centred moving mean (width 4 % of the steps), without the first tenth of the steps.

    None for fewer than 50 steps. What remains is the noise of batches and of training, in nats²; runs with the same order of the data share
    the former.
    """
    values = np.asarray(losses, dtype=np.float64)
    if len(values) < 50:
        return None
    half = max(2, round(_TREND * len(values)))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first = np.clip(np.arange(len(values)) - half, 0, None)
    last = np.clip(np.arange(len(values)) + half + 1, None, len(values))
    residual = values - (sums[last] - sums[first]) / (last - first)
    return float(np.var(residual[round(_SKIPPED * len(values)) :]))


def smoothed(losses: Sequence[float], points: int = 100) -> list[tuple[int, float]]:
    """A curve of at most `points` points: means over equal stretches, each at its middle step."""
    count = min(points, len(losses))
    edges = np.linspace(0, len(losses), count + 1).round().astype(int)
    return [
        (int(a + b) // 2, float(f"{np.mean(losses[a:b]):.5g}"))
        for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        if b > a
    ]


def clustered_mean(values: npt.ArrayLike, groups: Sequence[str]) -> tuple[float, float | None]:
    """The mean of samples, and its standard error where samples of one group are not independent; None for a single group.

    Args:
        values: (N,), one a sample; each counts alike.
        groups: N names. Groups are taken for independent draws, of whatever size.
    """
    samples = np.asarray(values, dtype=np.float64)
    mean = float(samples.mean())
    names, numbers = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        return mean, None
    sums = np.bincount(numbers, weights=samples - mean)
    return mean, float(np.sqrt(len(names) / (len(names) - 1) * np.sum(sums**2)) / len(samples))


def sure_errors(groups: int) -> float:
    """How many standard errors over so many groups, at least two, a mean must lie from 0 to differ from it with a confidence of 95 %.

    Student's quantile; between the table's rows linear in 1 / (degrees of freedom).
    """
    inverse = [1 / freedom for freedom in reversed(_STUDENT)]
    return float(np.interp(1 / (groups - 1), inverse, list(reversed(_STUDENT.values()))))
