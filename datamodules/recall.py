"""Synthetic recall tasks: multi-query associative recall and selective copying.

Every example is a function of (seed, split, index): the raw stream of a Philox counter generator, which NumPy guarantees for all versions.
Labels are -1 except where an answer is due; the answer is the label at the token that asks for it (labels are shifted by one already).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from datamodules.base import PackedDataModule
from datamodules.fingerprint import fingerprint_of
from datamodules.windows import EndlessBatches

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


class RecallDataModule(PackedDataModule):
    """A synthetic recall task; its batches have the form of text's.

    Args:
        task: `mqar` (multi-query associative recall) or `selective_copy`.
        seq_len: tokens a row, T.
        batch_size: rows a batch and rank, B.
        num_workers: worker processes that make training batches.
        seed: of examples and order.
        vocab_size: number of token ids.
        num_pairs: pairs to recall, or tokens to copy, an example.
        train_pairs: the same of training examples, which take these numbers in turn; None: `num_pairs`.
        train_examples: number of different training examples.
        validation_examples: number of validation examples, drawn from another stream of random numbers.
        shuffle: a new order every epoch.
        validation_batches: validation batches a rank; None: all.
    """

    def __init__(
        self,
        task: Literal["mqar", "selective_copy"] = "mqar",
        seq_len: int = 256,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        vocab_size: int = 512,
        num_pairs: int = 16,
        train_pairs: list[int] | None = None,
        train_examples: int = 100_000,
        validation_examples: int = 1_024,
        shuffle: bool = True,
        validation_batches: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, validation_batches=validation_batches, cache_dir=None)
        self.task_name, self.seq_len, self.seed, self.num_pairs, self.shuffle = task, seq_len, seed, num_pairs, shuffle
        self.train_pairs = [num_pairs] if train_pairs is None else train_pairs
        self.train_examples, self.validation_examples = train_examples, validation_examples
        self._vocab_size = vocab_size

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def validation_names(self) -> list[str]:
        return ["val"]

    def check(self) -> None:
        """Refuse bad settings.

        Raises:
            ValueError: one line.
        """
        self._check_common(self.seq_len)
        for name in ("train_examples", "validation_examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)} must be at least 1")
        judged, *learned = self._tasks()
        judged.check()
        if not self.train_pairs or any(type(count) is not int or count < 1 for count in self.train_pairs):
            raise ValueError(f"data.train_pairs={self.train_pairs} must be whole numbers of at least 1, or null for num_pairs")
        for task in learned:
            task.check()

    def prepare_data(self) -> None:
        self.check()

    def setup(self, stage: str | None = None) -> None:
        if self._train is not None:
            return
        self.check()
        judged, *learned = self._tasks()
        train = RecallExamples([task.example for task in learned], self.seed, 0, self.train_examples)
        self._validation = {"val": RecallExamples([judged.example], self.seed, 1, self.validation_examples)}
        self._train = EndlessBatches(
            train, self.batch_size, rank=self._rank, world_size=self._world_size, seed=self.seed, shuffle=self.shuffle
        )
        corpus = fingerprint_of([self.task_name, *map(repr, self._tasks()), self.train_examples])
        self._identity = {
            "source": self.task_name,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "corpus": corpus,
        }

    def _tasks(self) -> list[AssociativeRecall | SelectiveCopying]:
        """What is judged, then what is trained."""
        pairs = [self.num_pairs, *self.train_pairs]
        if self.task_name == "mqar":
            return [AssociativeRecall(self.seq_len, self.vocab_size, count) for count in pairs]
        if self.task_name == "selective_copy":
            return [SelectiveCopying(self.seq_len, self.vocab_size, count) for count in pairs]
        raise ValueError(f"data.task={self.task_name!r} is unknown; choose mqar or selective_copy")
