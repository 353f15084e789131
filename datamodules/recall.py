"""Synthetic recall tasks: multi-query associative recall and selective copying."""

from __future__ import annotations

from typing import Literal

from datamodules.base import PackedDataModule
from datamodules.fingerprint import fingerprint_of
from datamodules.recall_tasks import AssociativeRecall, RecallExamples, SelectiveCopying
from datamodules.windows import EndlessBatches


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
        validation_batches: validation batches that each rank reads, so that W ranks score W times as many sequences; None: all.
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
        """Token ids are below it."""
        return self._vocab_size

    @property
    def validation_names(self) -> list[str]:
        """Always one, `val`: sequences of `num_pairs` pairs."""
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
        """Nothing to make: the settings are checked, as in `check`."""
        self.check()

    def setup(self, stage: str | None = None) -> None:
        """Settle what each example is drawn from; once, for every stage.

        Raises:
            ValueError: as `check` does.
        """
        if self._train is not None:
            return
        super().setup(stage)
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
