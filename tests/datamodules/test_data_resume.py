"""Batch N after a resume is batch N of the uninterrupted run, to the bit, through a real Trainer, for every source."""

from __future__ import annotations

import os
import random
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from ranks import run_ranks

from datamodules import C4DataModule, RecallDataModule
from datamodules.base import PackedDataModule

SOURCES = ["sample", "local", "tokens", "hub", "recall"]
STEPS = 9


class Recorder(LightningModule):
    """Keeps each batch it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[dict[str, torch.Tensor]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.batches.append({name: value.clone() for name, value in batch.items()})
        return self.weight * batch["input_ids"].float().mean()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val/loss", self.weight, add_dataloader_idx=False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.fixture
def make_data(corpus: Path, tokens_dir: Path, tokenizer_path: str, sample_cache: Path, hub_folder: Path):
    def make(source: str, **changes: Any) -> PackedDataModule:
        common = {"seq_len": 300, "batch_size": 2, "seed": 3, "validation_batches": 2, **changes}
        if source == "sample":
            return C4DataModule(cache_dir=str(sample_cache), reset_at_documents=True, **common)
        if source == "tokens":
            return C4DataModule("tokens", tokens_dir=str(tokens_dir), reset_at_documents=True, **common)
        if source == "recall":
            return RecallDataModule(num_pairs=4, **common)
        text = {"tokenizer": tokenizer_path, "shuffle_block": 8, "reset_at_documents": True, **common}
        if source == "hub":
            return C4DataModule("hub", hub_dataset=str(hub_folder), hub_config=None, **text)
        return C4DataModule("local", train_files=str(corpus / "train-*"), **{"validation_fraction": 0.2, **text})

    return make


@pytest.fixture(scope="session")
def hub_folder(tmp_path_factory: pytest.TempPathFactory, texts: list[str], write_lines, json_lines) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    for number in range(3):
        write_lines(folder / f"train-{number}.jsonl", json_lines(texts[25 * number : 25 * number + 25]))
    write_lines(folder / "validation.jsonl", json_lines(texts[80:]))
    return folder


def _fit(
    data: PackedDataModule,
    folder: Path,
    *,
    callback: Callback | None = None,
    resume: Path | None = None,
    steps: int = STEPS,
    **settings: Any,
):
    module = Recorder()
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[callback] if callback else None, **settings,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return module.batches, trainer


def _assert_same(found: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> None:
    assert len(found) == len(expected) > 0
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), f"batch {number}, {name}"


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("source", SOURCES)
def test_a_resumed_run_sees_the_batches_of_the_uninterrupted_one(make_data, tmp_path: Path, source: str, num_workers: int) -> None:
    checkpoint = tmp_path / "step.ckpt"
    straight, _ = _fit(make_data(source, num_workers=num_workers), tmp_path, callback=SaveAt(checkpoint, 4))
    assert len(straight) == STEPS
    assert not all(torch.equal(straight[0]["input_ids"], batch["input_ids"]) for batch in straight[1:])
    resumed, _ = _fit(make_data(source, num_workers=num_workers), tmp_path, resume=checkpoint)
    _assert_same(resumed, straight[4:])


class DieAt(Callback):
    """Saves every second step, and is killed at a step as by `kill -9`."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
        if trainer.global_step % 2 == 0:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(("source", "num_workers"), [("sample", 0), ("local", 0), ("local", 2), ("tokens", 2)])
def test_killed_at_a_random_step(make_data, tmp_path: Path, source: str, num_workers: int) -> None:
    straight, _ = _fit(make_data(source, num_workers=num_workers), tmp_path)
    step, checkpoint = random.randrange(3, STEPS), tmp_path / "step.ckpt"
    killed = partial(_fit, make_data(source, num_workers=num_workers), tmp_path, callback=DieAt(checkpoint, step))
    assert run_ranks(killed, 1) == [-signal.SIGKILL]
    resumed, _ = _fit(make_data(source, num_workers=num_workers), tmp_path, resume=checkpoint)
    _assert_same(resumed, straight[(step - 1) // 2 * 2 :])


class SaveBatches(Callback):
    """Each rank's batches in a file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, module: Recorder) -> None:
        torch.save(module.batches, self.folder / f"rank-{trainer.global_rank}.pt")


def _fit_on_two_ranks(data: PackedDataModule, folder: Path, callbacks: list[Callback], resume: Path | None) -> list[Any]:
    folder.mkdir()
    assert run_ranks(_fit_rank, 2, data, folder, callbacks, resume) == [0, 0]
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]


def _fit_rank(data: PackedDataModule, folder: Path, callbacks: list[Callback], resume: Path | None) -> None:
    trainer = Trainer(
        max_steps=STEPS, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, default_root_dir=folder, callbacks=[*callbacks, SaveBatches(folder)],
    )  # fmt: skip
    trainer.fit(Recorder(), datamodule=data, ckpt_path=resume)


@pytest.mark.parametrize("source", ["sample", "local"])
def test_two_ranks_resume_each_at_its_own_place_through_the_trainer(make_data, tmp_path: Path, source: str) -> None:
    checkpoint = tmp_path / "step.ckpt"
    data = make_data(source, num_workers=1)
    straight = _fit_on_two_ranks(data, tmp_path / "straight", [SaveAt(checkpoint, 4)], None)
    resumed = _fit_on_two_ranks(make_data(source, num_workers=1), tmp_path / "resumed", [], checkpoint)
    for rank in range(2):
        assert len(straight[rank]) == STEPS
        _assert_same(resumed[rank], straight[rank][4:])
    assert not torch.equal(straight[0][0]["input_ids"], straight[1][0]["input_ids"])
    if source == "sample":  # two ranks with batch b see what one with 2b sees
        one, _ = _fit(make_data(source, batch_size=4), tmp_path)
        _assert_same([{name: torch.cat([a[name], b[name]]) for name in a} for a, b in zip(*straight, strict=True)], one)


@pytest.mark.parametrize("saved_at", [3, 6, 7])
def test_short_lightning_epochs_with_validation_go_on_with_the_data(make_data, tmp_path: Path, saved_at: int) -> None:
    """`limit_train_batches` cuts epochs of 3 batches: at their end, and within, nothing is repeated or left out."""
    straight, _ = _fit(make_data("local"), tmp_path)
    checkpoint = tmp_path / "step.ckpt"
    cut, _ = _fit(make_data("local"), tmp_path, callback=SaveAt(checkpoint, saved_at), limit_train_batches=3)
    _assert_same(cut, straight)
    resumed, _ = _fit(make_data("local"), tmp_path, resume=checkpoint, limit_train_batches=3)
    _assert_same(resumed, straight[saved_at:])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_checkpoint_saved_after_fit_holds_the_place_too(make_data, tmp_path: Path, num_workers: int) -> None:
    straight, _ = _fit(make_data("tokens", num_workers=num_workers), tmp_path)
    _, trainer = _fit(make_data("tokens", num_workers=num_workers), tmp_path, steps=5)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    resumed, _ = _fit(make_data("tokens", num_workers=num_workers), tmp_path, resume=tmp_path / "after.ckpt")
    _assert_same(resumed, straight[5:])


@pytest.mark.parametrize("source", ["sample", "tokens", "recall"])
def test_workers_change_nothing_where_access_is_random(make_data, source: str) -> None:
    found = []
    for num_workers in (0, 2):
        data = make_data(source, num_workers=num_workers)
        data.prepare_data()
        data.setup()
        iterator = iter(data.train_dataloader())
        found.append([next(iterator) for _ in range(5)])
    _assert_same(*found)


def test_the_loader_leaves_torchs_random_numbers_alone(make_data) -> None:
    before = torch.get_rng_state()
    data = make_data("tokens", num_workers=2)
    data.setup()
    next(iter(data.train_dataloader()))
    list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def _loader(data: PackedDataModule):
    data.setup()
    return data.train_dataloader()


def test_changed_settings_and_corpora_are_refused_in_one_line(make_data, corpus: Path, tokenizer_path: str, tmp_path: Path) -> None:
    state = _loader(make_data("local")).state_dict()
    for changes, message in (
        ({"seq_len": 25}, r"^cannot resume: data\.seq_len was 300 when the checkpoint was written, now it is 25; set it back$"),
        ({"batch_size": 3}, r"data\.batch_size was 2 "),
        ({"seed": 4}, r"data\.seed was 3 "),
        ({"num_workers": 2}, r"data\.num_workers was 0 "),
        ({"validation_fraction": 0.3}, r"data\.validation_fraction was 0\.2 "),
    ):
        with pytest.raises(ValueError, match=message):
            _loader(make_data("local", **changes)).load_state_dict(state)
    _loader(make_data("local", max_bad_line_share=0.5)).load_state_dict(state)  # changes no batch
    with pytest.raises(ValueError, match=r"data\.source was 'local' when the checkpoint was written, now it is 'tokens'"):
        _loader(make_data("tokens")).load_state_dict(state)
    with pytest.raises(
        ValueError, match="written by 2 process\\(es\\), this run has 1, and text is divided among them as it is read; start 2 "
    ):
        _loader(make_data("local")).load_state_dict({**state, "world_size": 2})
    with pytest.raises(ValueError, match="holds no position of this data loader"):
        _loader(make_data("local")).load_state_dict({"_snapshot": {}})


@pytest.mark.parametrize("name", ["train-0.jsonl", "train-1.jsonl.gz"])
def test_an_edited_corpus_is_refused(corpus: Path, tokenizer_path: str, tmp_path: Path, write_lines, json_lines, texts, name: str) -> None:
    def data() -> C4DataModule:
        return C4DataModule(
            "local", seq_len=24, batch_size=2, tokenizer=tokenizer_path, train_files=str(tmp_path / "train-*"), validation_fraction=0.2
        )

    for path in corpus.glob("train-*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = _loader(data()).state_dict()
    _loader(data()).load_state_dict(state)
    write_lines(tmp_path / name, json_lines(["something else", *texts[1:25]]))
    with pytest.raises(
        ValueError, match=r"^cannot resume: the corpus changed since the checkpoint was written \(fingerprint \w{12}, now \w{12}\); restore"
    ):
        _loader(data()).load_state_dict(state)


def _read_and_return(folder: Path, source: C4DataModule) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    source.setup()
    loader = source.train_dataloader()
    iterator = iter(loader)
    for _ in range(3 + rank):  # the ranks stand at different places
        next(iterator)
    state = loader.state_dict()
    expected = [next(iterator) for _ in range(3)]
    resumed = source.train_dataloader()
    resumed.load_state_dict(state)
    iterator = iter(resumed)
    found = [next(iterator) for _ in range(3)]
    torch.save({"found": found, "expected": expected, "state": state}, folder / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("source", ["local", "tokens"])
def test_two_ranks_keep_both_their_places(make_data, tmp_path: Path, source: str) -> None:
    assert run_ranks(_read_and_return, 2, tmp_path, make_data(source)) == [0, 0]
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=False) for rank in range(2))
    for rank in (first, second):
        _assert_same(rank["found"], rank["expected"])
    assert first["state"] == second["state"]  # every rank's checkpoint holds both places
    assert first["state"]["ranks"][0] != first["state"]["ranks"][1]
    assert not torch.equal(first["expected"][0]["input_ids"], second["expected"][0]["input_ids"])
    refusal = r"written by 2 process\(es\), this run has 1" if source == "local" else r"processes had read 3, 4 batches, which no other"
    with pytest.raises(ValueError, match=refusal):
        _loader(make_data(source)).load_state_dict(first["state"])
