"""However often a run is stopped, and with however many ranks it goes on, each token of an epoch is seen exactly once."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from ranks import run_ranks

from callbacks import RankChange
from datamodules import C4DataModule, RecallDataModule
from datamodules.base import PackedDataModule

SEQ_LEN = 100


class Reader(LightningModule):
    """Keeps the tokens of each step it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.rows: list[torch.Tensor] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.rows.append(batch["input_ids"].clone())
        return self.weight * batch["input_ids"].float().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Keep(Callback):
    """Saves at a step, writes each rank's rows as they come, and may kill a rank, as by kill −9, some steps later."""

    def __init__(self, folder: Path, save_at: int, kill: tuple[int, int] | None) -> None:
        self.folder, self.save_at, self.kill = folder, save_at, kill

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        whole = self.folder / f"rank-{trainer.global_rank}.pt"
        torch.save(torch.stack(module.rows), whole.with_suffix(".part"))
        whole.with_suffix(".part").replace(whole)  # not torn where this rank is killed
        if trainer.global_step == self.save_at and not trainer.fit_loop._should_accumulate():
            trainer.save_checkpoint(self.folder / "step.ckpt")
        if self.kill == (trainer.global_rank, trainer.global_step):
            os.kill(os.getpid(), signal.SIGKILL)


def fit(data: PackedDataModule, folder: Path, ranks: int, **options: Any) -> None:
    """Train to the end on ranks of their own, or in this process."""
    folder.mkdir()
    if ranks == 1:
        fit_rank(data, folder, ranks, **options)
    else:
        assert run_ranks(partial(fit_rank, data, folder, ranks, **options), ranks) == [0] * ranks


def fit_rank(
    data: PackedDataModule,
    folder: Path,
    ranks: int,
    *,
    steps: int,
    save_at: int = -1,
    kill: tuple[int, int] | None = None,
    resume: Path | None = None,
    accumulate: int = 1,
) -> None:
    """Train as one of so many ranks."""
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", accumulate_grad_batches=accumulate, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, default_root_dir=folder, limit_val_batches=0, devices=ranks,
        strategy="ddp" if ranks > 1 else "auto", callbacks=[RankChange(), Keep(folder, save_at, kill)],
    )  # fmt: skip
    trainer.fit(Reader(), datamodule=data, ckpt_path=resume)


def seen(folder: Path, ranks: int, batches: int | None = None) -> torch.Tensor:
    """Rows (N, T) of all ranks in the order of the samples: the first `batches` of each rank, or all."""
    by_rank = [torch.load(folder / f"rank-{rank}.pt")[:batches] for rank in range(ranks)]  # (G, B, T) each
    return torch.stack(by_rank, 1).flatten(0, 2)


def multiset(rows: torch.Tensor) -> list[bytes]:
    return sorted(row.numpy().tobytes() for row in rows)


@pytest.fixture
def tokens(tokens_dir: Path):
    def make(batch_size: int = 2, num_workers: int = 2) -> C4DataModule:
        return C4DataModule("tokens", tokens_dir=str(tokens_dir), seq_len=SEQ_LEN, batch_size=batch_size, num_workers=num_workers, seed=3)

    return make


def all_windows(data: PackedDataModule) -> torch.Tensor:
    data.setup()
    source: Any = data._train.source  # type: ignore[union-attr]
    return torch.from_numpy(source.batch(np.arange(source.num_windows))["input_ids"])


@pytest.mark.parametrize("source", ["tokens", pytest.param("local", marks=pytest.mark.faults)])
def test_three_preemptions_in_one_epoch(source: str, tokens: Any, corpus: Path, tokenizer_path: str, tmp_path: Path) -> None:
    """Two ranks, two workers each; twice stopped behind a save, once killed three steps after one, when more had been read."""

    def data() -> PackedDataModule:
        if source == "tokens":
            return tokens()
        files = {"train_files": str(corpus / "train-*"), "tokenizer": tokenizer_path, "validation_fraction": 0.2, "shuffle_block": 8}
        return C4DataModule("local", seq_len=SEQ_LEN, batch_size=2, num_workers=2, seed=3, **files)  # type: ignore[arg-type]

    windows = all_windows(tokens())
    steps = -(-len(windows) // 4)  # one epoch of the tokens, and the rest of the last batch
    assert steps > 20
    first, second, third = steps // 4, steps // 2, 3 * steps // 4
    fit(data(), tmp_path / "a", 2, steps=first, save_at=first)
    (tmp_path / "b").mkdir()
    killed = {"steps": steps, "save_at": second, "kill": (1, second + 3), "resume": tmp_path / "a" / "step.ckpt"}
    assert run_ranks(partial(fit_rank, data(), tmp_path / "b", 2, **killed), 2) == [1, -signal.SIGKILL]
    fit(data(), tmp_path / "c", 2, steps=third, save_at=third, resume=tmp_path / "b" / "step.ckpt")
    fit(data(), tmp_path / "d", 2, steps=steps, resume=tmp_path / "c" / "step.ckpt")
    fit(data(), tmp_path / "straight", 2, steps=steps)
    # What counts of the killed run is what its checkpoint holds.
    parts = [seen(tmp_path / "a", 2), seen(tmp_path / "b", 2, second - first), seen(tmp_path / "c", 2), seen(tmp_path / "d", 2)]
    rows = torch.cat(parts)
    assert torch.equal(rows, seen(tmp_path / "straight", 2))
    if source == "tokens":
        assert multiset(rows[: len(windows)]) == multiset(windows)


@pytest.mark.parametrize(
    ("then", "now", "batch_size", "accumulate"),
    [
        (2, 1, 2, 2),
        (2, 4, 1, 1),
        pytest.param(2, 1, 4, 1, marks=pytest.mark.faults),
        pytest.param(1, 2, 2, 1, marks=pytest.mark.faults),
        pytest.param(2, 3, 2, 1, marks=pytest.mark.faults),
        pytest.param(4, 2, 2, 2, marks=pytest.mark.faults),
    ],
    ids=str,
)
def test_an_epoch_that_other_ranks_end(then: int, now: int, batch_size: int, accumulate: int, tokens: Any, tmp_path: Path) -> None:
    windows = all_windows(tokens())
    a_step = now * batch_size * accumulate
    middle = len(windows) // (2 * then * 2)
    rest = -(-(len(windows) - middle * then * 2) // a_step)
    fit(tokens(num_workers=1), tmp_path / "a", then, steps=middle, save_at=middle)
    steps = {"steps": middle + rest, "save_at": middle + rest - 2}
    fit(tokens(batch_size), tmp_path / "b", now, accumulate=accumulate, resume=tmp_path / "a" / "step.ckpt", **steps)
    parts = [seen(tmp_path / "a", then), seen(tmp_path / "b", now)]
    assert len(parts[1]) == rest * a_step  # every step took as many batches as it should
    rows = torch.cat(parts)
    assert multiset(rows[: len(windows)]) == multiset(windows)
    fit(tokens(1, 0), tmp_path / "straight", 1, steps=len(windows))
    assert torch.equal(rows[: len(windows)], seen(tmp_path / "straight", 1))  # in the order of one process, too
    # And once more, from a checkpoint of the second run.
    fit(tokens(batch_size), tmp_path / "c", now, accumulate=accumulate, resume=tmp_path / "b" / "step.ckpt", steps=middle + rest)
    assert torch.equal(seen(tmp_path / "c", now), parts[1][-2 * a_step :])


def test_steps_of_other_micro_batches_are_whole_ones(tokens: Any, tmp_path: Path) -> None:
    """Five steps of three, then four of four."""
    fit(tokens(), tmp_path / "a", 1, steps=5, save_at=5, accumulate=3)
    fit(tokens(), tmp_path / "b", 1, steps=9, save_at=9, accumulate=4, resume=tmp_path / "a" / "step.ckpt")
    fit(tokens(), tmp_path / "straight", 1, steps=5 * 3 + 4 * 4)
    assert torch.equal(torch.cat([seen(tmp_path / "a", 1), seen(tmp_path / "b", 1)]), seen(tmp_path / "straight", 1))


def test_other_ranks_over_text_are_refused_in_one_line(corpus: Path, tokenizer_path: str, tmp_path: Path) -> None:
    def data() -> C4DataModule:
        return C4DataModule("local", seq_len=24, batch_size=2, train_files=str(corpus / "train-*"), tokenizer=tokenizer_path)

    fit(data(), tmp_path / "a", 2, steps=3, save_at=2)
    with pytest.raises(
        ValueError, match=r"^cannot resume: the checkpoint was written by 2 process\(es\), this run has 1, and text is"
    ) as error:
        fit(data(), tmp_path / "b", 1, steps=4, resume=tmp_path / "a" / "step.ckpt")
    assert str(error.value).endswith(
        "; start 2 (trainer.devices, trainer.num_nodes). Tokens that `prepare` wrote can go on with any number"
    )


@pytest.mark.parametrize(("ready", "steps"), [(7, 1), (6, 1), (1, 0)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_from_within_a_step_is_refused(ready: int, steps: int, ranks: int) -> None:
    progress = {"current": {"ready": ready}, "total": {"ready": ready}, "is_last_batch": False}
    step = {"optimizer": {"step": {"current": {"completed": steps}}}}
    loop = {"state_dict": {"combined_loader": [{"world_size": ranks}]}, "epoch_loop.batch_progress": progress}
    loop["epoch_loop.automatic_optimization.optim_progress"] = step
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.state.fn = "fit"  # type: ignore[assignment]
    checkpoint = {"loops": {"fit_loop": loop}, "accumulated_batches": 4}
    taken = ready - 4 * steps
    with pytest.raises(
        ValueError, match=rf"^cannot resume: .* within a step, after {taken} of its 4 micro-batches, .* \(--ckpt_path last\)"
    ):
        RankChange().on_load_checkpoint(trainer, Reader(), checkpoint)


def test_the_place_of_a_row_is_where_it_was_read(tmp_path: Path) -> None:
    data = RecallDataModule(num_pairs=2, vocab_size=16, seq_len=8, batch_size=3, num_workers=2, train_examples=50)
    data.setup()
    loader = data.train_dataloader()
    assert loader.batches_given == 0
    iterator = iter(loader)
    for given in range(1, 6):
        batch = next(iterator)
        assert loader.batches_given == given
    windows = [place["window"] for place in loader.dataset.places(4)]  # type: ignore[attr-defined]
    assert torch.equal(batch["input_ids"], torch.from_numpy(loader.dataset.source.batch(np.array(windows))["input_ids"]))  # type: ignore[attr-defined]
    state = loader.state_dict()
    again = data.train_dataloader()
    again.load_state_dict(state)
    assert again.batches_given == 5
