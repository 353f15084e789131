"""Batches from sources with random access: built-in sample, memory-mapped tokens, synthetic tasks.

The position is one number. Batch `g` of all ranks together is a function of (seed, g) alone: rank r of W takes its B rows of W·B, so that
two ranks with batch b see what one with 2b sees, and worker w of n makes the batches w, w+n, ...: their number changes nothing either.
A run that goes on with other numbers of ranks or rows begins its batches at the sample that it had come to (`start`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from datamodules.permutation import Permutation

Batch = dict[str, Tensor]


class RandomAccess(Protocol):
    """A finite source: `batch` gives arrays (B, T) of the windows with the given numbers (B,), each in `[0, num_windows)`."""

    num_windows: int

    def batch(self, windows: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]: ...


def to_tensors(arrays: dict[str, npt.NDArray[Any]]) -> Batch:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class EndlessBatches(IterableDataset[Batch]):
    """Training batches without end: epoch after epoch, each in its own seeded order; a batch may reach into the next epoch.

    Args:
        source: where windows come from.
        batch_size: rows a rank and batch.
        rank, world_size: this process among those that train together.
        seed: of the order.
        shuffle: False: in the source's order.

    Attributes:
        start: the sample, in the order of all epochs, at which batch 0 of all ranks begins.
    """

    def __init__(self, source: RandomAccess, batch_size: int, *, rank: int, world_size: int, seed: int, shuffle: bool) -> None:
        super().__init__()
        self.source, self.batch_size, self.rank, self.world_size, self.seed, self.shuffle = (
            source,
            batch_size,
            rank,
            world_size,
            seed,
            shuffle,
        )
        self.start = 0

    def __iter__(self) -> _EndlessIterator:
        worker = get_worker_info()
        return _EndlessIterator(self, *((0, 1) if worker is None else (worker.id, worker.num_workers)))

    def batch(self, number: int) -> Batch:
        """This rank's part of batch `number` (0-based)."""
        return to_tensors(self.source.batch(self.windows(number)))

    def places(self, number: int) -> list[dict[str, Any]]:
        """Where each row of this rank's part of batch `number` lies: its `window`, and what the source's `place` adds to that."""
        place = getattr(self.source, "place", lambda window: {})
        return [{"window": int(window), **place(int(window))} for window in self.windows(number)]

    def windows(self, number: int) -> npt.NDArray[np.int64]:
        """Numbers (B,) of the windows in this rank's part of batch `number`."""
        first = self.start + (number * self.world_size + self.rank) * self.batch_size
        positions = np.arange(first, first + self.batch_size, dtype=np.int64)
        epochs, offsets = np.divmod(positions, self.source.num_windows)
        if self.shuffle:
            for epoch in np.unique(epochs):
                chosen = epochs == epoch
                offsets[chosen] = Permutation(self.source.num_windows, self.seed, int(epoch))(offsets[chosen])
        return offsets


class _EndlessIterator(Iterator[Batch]):
    def __init__(self, dataset: EndlessBatches, worker: int, num_workers: int) -> None:
        self._dataset, self._worker, self._num_workers, self._made = dataset, worker, num_workers, 0

    def __next__(self) -> Batch:
        batch = self._dataset.batch(self._made * self._num_workers + self._worker)
        self._made += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        return {"made": self._made}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._made = state["made"]


class ValidationBatches(IterableDataset[Batch]):
    """A finite pass over the first windows of a source, the same windows whatever the number of ranks.

    Every rank gets the same number of windows (up to `world_size - 1` are left over), since ranks that run out at different times hang.

    Args:
        source: where windows come from.
        batch_size: rows a rank and batch.
        rank, world_size: this process among those that validate together.
        max_batches: at most so many batches a rank; None: all.
    """

    def __init__(self, source: RandomAccess, batch_size: int, *, rank: int, world_size: int, max_batches: int | None) -> None:
        super().__init__()
        self.source, self.batch_size, self.rank, self.world_size = source, batch_size, rank, world_size
        self.num_rows = source.num_windows // world_size
        if self.num_rows == 0:
            raise ValueError(
                f"validation has {source.num_windows} windows, too few for {world_size} ranks: give more text or lower seq_len"
            )
        if max_batches is not None:
            self.num_rows = min(self.num_rows, max_batches * batch_size)

    def __len__(self) -> int:
        return -(-self.num_rows // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, self.num_rows, self.batch_size):
            rows = np.arange(first, min(first + self.batch_size, self.num_rows), dtype=np.int64)
            # In blocks a batch, as in training: rank r of W takes its part of each batch of all ranks.
            yield to_tensors(self.source.batch(first * self.world_size + self.rank * len(rows) + (rows - first)))
