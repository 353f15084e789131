"""Examples of multi-query associative recall and of selective copying.

Every example is a function of (seed, split, index): the raw stream of a Philox counter generator, which NumPy guarantees for all versions.
Labels are -1 except where an answer is due; the answer is the label at the token that asks for it (labels are shifted by one already).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_IGNORED = -1
Array = npt.NDArray[np.int64]


class _Draws:
    """Uniform draws of one example."""

    def __init__(self, seed: int, split: int, index: int) -> None:
        key = np.asarray([(2 * seed + split) % 2**64, index], dtype=np.uint64)
        self._bits = np.random.Philox(key=key)

    def uniform(self, size: int) -> npt.NDArray[np.float64]:
        """Floats in (0, 1), (size,)."""
        return ((self._bits.random_raw(size) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def integers(self, low: int, high: int, size: int) -> Array:
        """Ints in [low, high), (size,)."""
        return low + (self.uniform(size) * (high - low)).astype(np.int64)

    def distinct(self, low: int, high: int, size: int) -> Array:
        """Different ints in [low, high) in random order, (size,)."""
        return low + _smallest(self.uniform(high - low), size)


def _smallest(values: npt.NDArray[np.float64], size: int) -> Array:
    """Places of the `size` smallest values, the smallest first: the head of a sort, without sorting the rest."""
    if size < len(values):
        places = np.sort(np.argpartition(values, size - 1)[:size])
        return places[np.argsort(values[places], kind="stable")]
    return np.argsort(values, kind="stable")


@dataclass(frozen=True)
class AssociativeRecall:
    """Multi-query associative recall (Arora et al., Zoology, 2023, arXiv:2312.04927).

    `k1 v1 k2 v2 ...`, then each key once more at a place further on, with its value as the label; the gaps follow a power law, short ones
    being likelier. Keys are in [1, vocab/2), values in [vocab/2, vocab), everything between is token 0.

    Args:
        seq_len: tokens an example, at least `3 * num_pairs`.
        vocab_size: at least `2 * num_pairs + 2`.
        num_pairs: pairs of key and value an example.
        power: the law's exponent: P(slot) ∝ slot^(power − 1).
    """

    seq_len: int
    vocab_size: int
    num_pairs: int
    power: float = 0.01

    def check(self) -> None:
        if self.num_pairs < 1:
            raise ValueError(f"data.num_pairs={self.num_pairs} must be at least 1")
        if self.vocab_size // 2 - 1 < self.num_pairs:
            raise ValueError(
                f"data.vocab_size={self.vocab_size} is too small for {self.num_pairs} pairs: give at least {2 * self.num_pairs + 2}"
            )
        if self.seq_len < 3 * self.num_pairs:
            raise ValueError(f"data.seq_len={self.seq_len} is too short for {self.num_pairs} pairs: give at least {3 * self.num_pairs}")

    def example(self, draws: _Draws) -> tuple[Array, Array]:
        half, context = self.vocab_size // 2, 2 * self.num_pairs
        keys = draws.distinct(1, half, self.num_pairs)
        values = draws.integers(half, self.vocab_size, self.num_pairs)
        inputs, labels = np.zeros(self.seq_len, np.int64), np.full(self.seq_len, _IGNORED, np.int64)
        inputs[0:context:2], inputs[1:context:2] = keys, values
        # Exponential races: the num_pairs smallest of E/weight are a weighted draw without replacement.
        weights = np.arange(1, self.seq_len - context + 1, dtype=np.float64) ** (self.power - 1.0)
        slots = context + _smallest(-np.log(draws.uniform(len(weights))) / weights, self.num_pairs)
        inputs[slots], labels[slots] = keys, values
        return inputs, labels


@dataclass(frozen=True)
class SelectiveCopying:
    """Selective copying (Gu and Dao, Mamba, 2023, arXiv:2312.00752; Jing et al. 2019).

    `num_pairs` tokens to remember lie at random places among noise (token 0); at the end stand as many markers (token 1), whose labels
    are those tokens in their order.

    Args:
        seq_len: tokens an example, at least `2 * num_pairs`.
        vocab_size: at least 3; tokens to remember are in [2, vocab_size).
        num_pairs: tokens to remember.
    """

    seq_len: int
    vocab_size: int
    num_pairs: int

    def check(self) -> None:
        if self.num_pairs < 1:
            raise ValueError(f"data.num_pairs={self.num_pairs} must be at least 1")
        if self.vocab_size < 3:
            raise ValueError(f"data.vocab_size={self.vocab_size} is too small for selective copying: give at least 3")
        if self.seq_len < 2 * self.num_pairs:
            raise ValueError(
                f"data.seq_len={self.seq_len} is too short to copy {self.num_pairs} tokens: give at least {2 * self.num_pairs}"
            )

    def example(self, draws: _Draws) -> tuple[Array, Array]:
        context = self.seq_len - self.num_pairs
        inputs, labels = np.zeros(self.seq_len, np.int64), np.full(self.seq_len, _IGNORED, np.int64)
        content = draws.integers(2, self.vocab_size, self.num_pairs)
        inputs[np.sort(draws.distinct(0, context, self.num_pairs))] = content
        inputs[context:], labels[context:] = 1, content
        return inputs, labels


class RecallExamples:
    """`num_windows` examples by number, of the given tasks in turn; `split` 0 is training, 1 validation."""

    def __init__(self, examples: Sequence[Callable[[_Draws], tuple[Array, Array]]], seed: int, split: int, num_windows: int) -> None:
        self._examples, self._seed, self._split, self.num_windows = examples, seed, split, num_windows

    def batch(self, windows: Array) -> dict[str, npt.NDArray[Any]]:
        tasks = len(self._examples)
        rows = [self._examples[int(window) % tasks](_Draws(self._seed, self._split, int(window))) for window in windows]
        return {"input_ids": np.stack([row[0] for row in rows]), "labels": np.stack([row[1] for row in rows])}
