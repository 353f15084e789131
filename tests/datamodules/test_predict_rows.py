"""Prediction reads each row once over all ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from ranks import run_ranks
from torch import Tensor

from datamodules import C4DataModule
from datamodules.base import PackedDataModule


def data_module(tokens_dir: Path, validation_batches: int | None = None) -> C4DataModule:
    return C4DataModule("tokens", seq_len=32, batch_size=2, tokens_dir=str(tokens_dir), validation_batches=validation_batches)


def predicted(data: PackedDataModule) -> Tensor:
    data.setup()
    return torch.cat([batch["input_ids"] for batch in data.predict_dataloader()])


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("validation_batches", [None, 2])
def test_the_ranks_divide_the_rows(
    tokens_dir: Path, world_size: int, validation_batches: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = predicted(data_module(tokens_dir))
    assert len(alone) > 2 * 2 * world_size
    monkeypatch.setattr(PackedDataModule, "_world_size", world_size)
    for rank in range(world_size):
        monkeypatch.setattr(PackedDataModule, "_rank", rank)
        own = alone[rank::world_size]
        assert torch.equal(predicted(data_module(tokens_dir, validation_batches)), own if validation_batches is None else own[:4])


def test_fewer_rows_than_ranks_is_one_line(tokens_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedDataModule, "_world_size", 10_000)
    with pytest.raises(ValueError, match=r"^there are \d+ sequences to predict, too few for 10000 ranks: start fewer$"):
        predicted(data_module(tokens_dir))


class Echo(LightningModule):
    """Keeps what it reads, each rank for itself."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.rows: list[Tensor] = []

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.rows.append(batch["input_ids"])

    def on_predict_end(self) -> None:
        torch.save(torch.cat(self.rows), self.folder / f"{self.global_rank}.pt")


def predict_rank(tokens_dir: Path, folder: Path, own_sampler: bool) -> None:
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "default_root_dir": folder, "accelerator": "cpu"}
    trainer = Trainer(devices=2, strategy="ddp", use_distributed_sampler=own_sampler, **options)
    trainer.predict(Echo(folder), datamodule=data_module(tokens_dir))


@pytest.mark.parametrize("own_sampler", [True, False])
def test_two_processes_divide_the_rows_through_the_trainer(tokens_dir: Path, tmp_path: Path, own_sampler: bool) -> None:
    """Also where Lightning would divide them once more."""
    assert run_ranks(predict_rank, 2, tokens_dir, tmp_path, own_sampler) == [0, 0]
    alone = predicted(data_module(tokens_dir))
    for rank in (0, 1):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), alone[rank::2])
