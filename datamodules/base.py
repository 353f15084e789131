"""What the data modules share: who reads what in a distributed run, and the loaders."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader, Dataset, IterableDataset

from datamodules.loader import ResumableDataLoader
from datamodules.windows import Batch, RandomAccess, ValidationBatches, to_tensors
from datamodules.workers import worker_context


class PackedDataModule(LightningDataModule):
    """A data module of batches `{"input_ids": int64 (B,T), "labels": int64 (B,T)[, "reset": bool (B,T)]}`.

    A subclass sets up `_train`, `_validation` and `_identity` in its `setup`, and says in `check` what is wrong before anything is built.
    """

    def __init__(self, *, batch_size: int, num_workers: int, validation_batches: int | None, cache_dir: str | None) -> None:
        super().__init__()
        self.batch_size, self.num_workers, self.validation_batches, self.cache_dir = batch_size, num_workers, validation_batches, cache_dir
        self._train: IterableDataset[Batch] | None = None
        self._validation: dict[str, RandomAccess] = {}
        self._identity: dict[str, Any] = {}

    def setup(self, stage: str | None = None) -> None:
        """Start the server of the data workers: it takes seconds to import torch, and the run has more to set up meanwhile."""
        if stage == "fit" and self.num_workers > 0:
            worker_context()

    @abstractmethod
    def check(self) -> None:
        """Refuse bad settings and files with a one-line error, without building or writing anything."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Token ids are below it. Known before `setup`."""

    @property
    @abstractmethod
    def validation_names(self) -> list[str]:
        """Names of the loaders of `val_dataloader`, in their order; `["val"]` where there is one without a name."""

    @property
    def data_order(self) -> dict[str, Any]:
        """What the order of the training samples depends on, by name; complete after `setup`. All ranks must agree on it."""
        return {**self._identity, "num_workers": self.num_workers, "ranks": self._world_size}

    def train_dataloader(self) -> ResumableDataLoader:
        """Endless, resumable: see `ResumableDataLoader`.

        Raises:
            ValueError: before `setup`.
        """
        if self._train is None:
            raise ValueError("the data module is not set up: call prepare_data() and setup() first")
        return ResumableDataLoader(
            self._train, num_workers=self.num_workers, rank=self._rank, world_size=self._world_size, identity=self._identity
        )

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """One loader, or a list in the order of `validation_names`; every rank gets equally many batches and rows.

        Raises:
            ValueError: fewer windows than ranks.
        """
        loaders = [self._validation_loader(self._validation[name]) for name in self.validation_names]
        return loaders if len(loaders) > 1 else loaders[0]

    def test_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """As in validation: a test reads the same batches."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        """The first validation source, each row once over all ranks: rank r of W takes rows r, r + W, r + 2W, ...

        Ranks may differ by one row, and so by one batch. Map-style, since Lightning wraps the sampler to track indices. It adds no sampler
        of its own to one that is distributed already.

        Raises:
            ValueError: fewer sequences than ranks.
        """
        source, world_size = self._validation[self.validation_names[0]], self._world_size
        if source.num_windows < world_size:
            raise ValueError(f"there are {source.num_windows} sequences to predict, too few for {world_size} ranks: start fewer")
        most = None if self.validation_batches is None else self.validation_batches * self.batch_size * world_size
        rows = _Rows(source, most)
        sampler = UnrepeatedDistributedSampler(rows, num_replicas=world_size, rank=self._rank, shuffle=False)
        return DataLoader(rows, batch_size=self.batch_size, sampler=sampler)

    def _validation_loader(self, source: RandomAccess) -> DataLoader[Batch]:
        batches = ValidationBatches(
            source, self.batch_size, rank=self._rank, world_size=self._world_size, max_batches=self.validation_batches
        )
        # A generator of its own: making an iterator draws a seed, and validating must not move torch's global random numbers.
        return DataLoader(batches, batch_size=None, generator=torch.Generator().manual_seed(0), pin_memory=torch.cuda.is_available())

    @property
    def _rank(self) -> int:
        if self.trainer is not None:
            return self.trainer.global_rank
        return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0

    @property
    def _world_size(self) -> int:
        if self.trainer is not None:
            return self.trainer.world_size
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    @property
    def _cache(self) -> Path:
        if self.cache_dir is not None:
            return Path(self.cache_dir).expanduser()
        root = self.trainer.default_root_dir if self.trainer is not None else "runs"
        return Path(root) / "data"

    def _check_common(self, seq_len: int) -> None:
        for name, value, least in (("seq_len", seq_len, 1), ("batch_size", self.batch_size, 1), ("num_workers", self.num_workers, 0)):
            if value < least:
                raise ValueError(f"data.{name}={value} must be at least {least}")
        if self.validation_batches is not None and self.validation_batches < 1:
            raise ValueError(f"data.validation_batches={self.validation_batches} must be at least 1, or null for all")


class _Rows(Dataset[Batch]):
    def __init__(self, source: RandomAccess, most: int | None) -> None:
        self._source = source
        self._length = source.num_windows if most is None else min(most, source.num_windows)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        return {name: rows[0] for name, rows in to_tensors(self._source.batch(torch.tensor([index]).numpy())).items()}
