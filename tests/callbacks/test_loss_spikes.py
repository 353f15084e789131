"""A loss that jumps in one step is found, named, counted, and its text can be read."""

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from ranks import train_on_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import LossSpikes
from callbacks.late_steps import GivenBatch, StepRecord
from datamodules import C4DataModule, RecallDataModule

WINDOW = 20


class Jump(Callback):
    """Takes a step of this rank for one with a loss of `by` more."""

    def __init__(self, step: int, by: float) -> None:
        self.step, self.by = step, by

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step + 1:
            pl_module.last_step_loss = pl_module.last_step_loss + self.by


def fit(folder: Path, stubs: ModuleType, data: Any, jumps: list[Callback], **options: Any) -> LossSpikes:
    spikes = LossSpikes(WINDOW)
    trainer = stubs.make_trainer(folder, [*jumps, spikes], max_steps=30, limit_val_batches=0, **options)
    vocab_size = data.vocab_size
    trainer.fit(stubs.make_module({"vocab_size": vocab_size}, learning_rate=1e-6), datamodule=data)
    return spikes


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sample")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_jump_is_reported_with_the_text_of_its_batch(
    num_workers: int, sample: Path, tmp_path: Path, stubs: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    data = C4DataModule(
        "sample", vocab_size=300, seq_len=8, batch_size=2, num_workers=num_workers, validation_batches=1, cache_dir=str(sample)
    )
    fit(tmp_path, stubs, data, [Jump(25, 50.0)], accumulate_grad_batches=2)
    path = tmp_path / "batches" / "step=000025-rank=0.jsonl"
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "spike" in line]
    assert line.startswith("loss spike at step 25, rank 0: loss 5")
    assert line.endswith(f"; its text: {path}")
    rows = [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines()]
    assert [(row["micro_batch"], row["row"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for row in rows:  # its place leads to the same text
        stored = torch.from_file(str(next(sample.glob("*/tokens")) / row["file"]), dtype=torch.uint16, size=row["token"] + 8)
        assert data.tokenizer.decode(stored[row["token"] :].tolist()) == row["text"]
        window = data._train.source.batch(torch.tensor([row["window"]]).numpy())["input_ids"][0]
        assert window.tolist() == stored[row["token"] :].tolist()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert {event.step: event.value for event in events.Scalars("train/spike")} == {step: float(step == 25) for step in range(30)}


def test_without_a_tokenizer_the_ids_are_kept(tmp_path: Path, stubs: ModuleType) -> None:
    data = RecallDataModule(num_pairs=2, vocab_size=16, seq_len=8, batch_size=2, train_examples=50, validation_examples=4)
    fit(tmp_path, stubs, data, [Jump(22, 50.0)], logger=False)
    rows = [json.loads(row) for row in (tmp_path / "batches" / "step=000022-rank=0.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["token_ids"] == data._train.source.batch(torch.tensor([row["window"]]).numpy())["input_ids"][0].tolist()


def test_a_text_that_cannot_be_written_ends_no_run(tmp_path: Path, stubs: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """A file lies where the folder would be."""
    (tmp_path / "batches").touch()
    fit(tmp_path, stubs, stubs.StubData(), [Jump(25, 50.0)], logger=False)
    assert "its text could not be written: " in capsys.readouterr().out


def test_a_quiet_run_has_none(tmp_path: Path, stubs: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, stubs, stubs.StubData(), [], logger=False)
    assert "spike" not in capsys.readouterr().out
    assert not (tmp_path / "batches").exists()


@pytest.mark.parametrize(("step", "by"), [(WINDOW - 2, 50.0), (25, -50.0)], ids=["too early", "downwards"])
def test_what_is_no_spike(step: int, by: float, tmp_path: Path, stubs: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, stubs, stubs.StubData(), [Jump(step, by)], logger=False)
    assert "spike" not in capsys.readouterr().out


def judge(losses: list[float], capsys: pytest.CaptureFixture[str], spikes: LossSpikes, tmp_path: Path) -> list[str]:
    trainer: Any = SimpleNamespace(
        global_rank=0, world_size=1, default_root_dir=str(tmp_path), fast_dev_run=False, train_dataloader=None, log_every_n_steps=1000,
        max_steps=-1, is_global_zero=False, loggers=[],
    )  # fmt: skip
    module = SimpleNamespace(device=torch.device("cpu"))
    for step, loss in enumerate(losses):
        spikes.step_done(trainer, module, StepRecord(step, loss, 1.0, [GivenBatch(torch.tensor([[1, 2]]), None)]))
    return [line for line in capsys.readouterr().out.splitlines() if "spike" in line]


def test_the_rule_is_six_deviations_above_the_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calm = [1.0, 3.0] * 20  # mean 2, deviation 1.01 (of a sample)
    deviation = float(torch.tensor(calm[-32:]).std())
    assert judge([*calm, 2.0 + 5.99 * deviation], capsys, LossSpikes(32), tmp_path) == []
    (line,) = judge([*calm, 2.0 + 6.01 * deviation], capsys, LossSpikes(32), tmp_path)
    assert "expected 2.0000 ± 1.0160; its text: " in line
    assert judge([*calm, float("nan"), 3.0], capsys, LossSpikes(32), tmp_path) == []
    assert judge([1.0] * 40 + [1.1], capsys, LossSpikes(32), tmp_path) == []  # without any deviation there is no measure


def test_its_window_travels_in_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = LossSpikes(32), LossSpikes(32)
    judge([1.0, 3.0] * 20, capsys, first, tmp_path)
    second.load_state_dict(first.state_dict())
    assert len(judge([20.0], capsys, second, tmp_path)) == 1


def test_a_rank_keeps_a_hundred_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "batches").mkdir()
    for step in range(100):
        (tmp_path / "batches" / f"step={step:06d}-rank=0.jsonl").touch()
    spikes = LossSpikes(32)
    (line,) = judge([*[1.0, 3.0] * 80, 20.0], capsys, spikes, tmp_path)
    assert line.endswith("; its text is not kept")


def test_each_rank_judges_its_own_and_the_curve_has_both(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """An infinite loss is none: the step is skipped; so rank 1's is made large by hand."""
    logger = TensorBoardLogger(tmp_path, name="tb", version="")
    options = {"max_steps": 24, "log_every_n_steps": 4, "logger": logger}
    options |= {"spikes": {"window": WINDOW}, "model": {"learning_rate": 1e-6}}
    train_on_ranks({"folder": tmp_path, "faults": [{"kind": "spike", "rank": 1, "step": 21}], **options}, 2)
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "spike" in line]
    assert line.startswith("loss spike at step 21, rank 1: ")
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert {event.step: event.value for event in events.Scalars("train/spike")} == {0: 0, 4: 0, 8: 0, 12: 0, 16: 0, 20: 0, 23: 1}


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"loss_spikes\.window is 3; give at least 20 steps"):
        LossSpikes(3)
    with pytest.raises(ValueError, match=r"loss_spikes\.sigmas is 0; give a finite number above 0"):
        LossSpikes(sigmas=0)
