"""Ranks that hold shards validate, test and predict what one process does, whatever each has to read."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loops import utilities
from ranks import run_ranks
from stub_run import VOCAB, StubData, make_batch, make_module, make_trainer
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.base import PackedDataModule
from lightning_modules.fsdp2_strategy import FSDP2Strategy


class Windows:
    """So many sequences, by number."""

    def __init__(self, num_windows: int) -> None:
        self.num_windows = num_windows

    def batch(self, windows: Any) -> dict[str, Any]:
        return {name: rows.numpy() for name, rows in make_batch(windows.tolist()).items()}


class WindowsData(PackedDataModule):
    """Batches of two of them, to validate and predict."""

    vocab_size, validation_names = VOCAB, ["val"]

    def __init__(self, num_windows: int) -> None:
        super().__init__(batch_size=2, num_workers=0, validation_batches=None, cache_dir=None)
        self._validation = {"val": Windows(num_windows)}

    def check(self) -> None:
        """Nothing to refuse."""


def trainer_on(folder: Path, ranks: int, strategy: Any, **options: Any) -> Trainer:
    return make_trainer(folder, devices=ranks, strategy=strategy, logger=False, **options)


def predicted(trainer: Trainer, module: Any, data: Any) -> Tensor:
    batches = trainer.predict(module, data)
    assert batches is not None
    return torch.cat([batch["log_likelihood"] for batch in batches])


def evaluate(folder: Path, num_windows: int) -> None:
    """On each rank: validation's loss and its own sequences' predictions, to a file; a second pass finds all as the first did."""
    trainer, module, data = trainer_on(folder, 2, FSDP2Strategy()), make_module(), WindowsData(num_windows)
    found = predicted(trainer, module, data)
    (validated,) = trainer.validate(module, data, verbose=False)
    assert torch.equal(predicted(trainer, module, data), found)
    torch.save((found, validated), folder / f"{trainer.global_rank}.pt")


@pytest.mark.parametrize("num_windows", [5, 7], ids=["unequal batches", "unequal rows"])
def test_ranks_with_unequal_rows_predict_and_validate(num_windows: int, tmp_path: Path) -> None:
    """Each sequence is predicted once, as one process does it. Validation leaves out the one that not every rank has an equal of."""
    assert run_ranks(evaluate, 2, tmp_path, num_windows) == [0, 0]
    alone, module = trainer_on(tmp_path, 1, "auto"), make_module()
    expected = predicted(alone, module, WindowsData(num_windows))
    (validated,) = alone.validate(module, WindowsData(num_windows - 1), verbose=False)
    for rank in (0, 1):
        found, losses = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found, expected[rank::2])
        assert losses == pytest.approx(validated, rel=1e-6)


def predict_own(folder: Path) -> None:
    """On each rank: loaders of a rank's own making, one with three batches and one with one."""
    trainer = trainer_on(folder, 2, FSDP2Strategy(), use_distributed_sampler=False)
    batches = [[[0], [1, 2, 3], [4, 5]], [[6, 7]]][trainer.global_rank]
    loader = DataLoader([make_batch(rows) for rows in batches], batch_size=None)
    torch.save(predicted(trainer, make_module(), loader), folder / f"{trainer.global_rank}.pt")


def test_ranks_predict_what_their_loaders_give(tmp_path: Path) -> None:
    assert run_ranks(predict_own, 2, tmp_path) == [0, 0]
    expected = predicted(trainer_on(tmp_path, 1, "auto"), make_module(), WindowsData(8))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close(torch.cat(found), expected)


def evaluate_as_over_nccl(folder: Path) -> None:
    """Lightning's loops ask which backend there is, and give gloo what they give no other."""
    utilities.dist = SimpleNamespace(get_backend=lambda: "nccl")
    trainer, module, data = trainer_on(folder, 1, FSDP2Strategy(), max_steps=1), make_module(), WindowsData(4)
    for run in (trainer.validate, trainer.test, trainer.predict):
        run(module, data)
    assert not any(loop.inference_mode for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop))
    trainer.fit(module, datamodule=StubData())
    assert trainer.global_step == 1


def test_evaluation_over_nccl_makes_no_inference_tensors(tmp_path: Path) -> None:
    """Which have no version for shards to keep, and none that a later backward could use."""
    assert run_ranks(evaluate_as_over_nccl, 1, tmp_path) == [0]


def evaluate_on_one(folder: Path, accelerator: str, strategy: Any) -> tuple[float, Tensor]:
    """The loss of validation, and the predictions."""
    trainer = make_trainer(folder, accelerator=accelerator, devices=1, strategy=strategy, logger=False)
    module, data = make_module(), WindowsData(4)
    (losses,) = trainer.validate(module, data, verbose=False)
    return losses["val/loss"], predicted(trainer, module, data)


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_evaluation_on_one_gpu(tmp_path: Path) -> None:
    """In a process of its own, which takes its group of ranks with it."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        (expected, expected_rows), (loss, rows) = (
            pool.submit(evaluate_on_one, tmp_path, "gpu", strategy).result() for strategy in ("auto", "fsdp2")
        )
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(rows, expected_rows)
