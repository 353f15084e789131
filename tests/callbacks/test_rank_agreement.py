"""Ranks that differ in anything that must be the same are refused before the first step, in one line that names it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fault_run
import pytest
from ranks import run_ranks, train_on_ranks

from callbacks import RankAgreement
from callbacks.rank_agreement import disagreement
from datamodules import RecallDataModule


def test_two_ranks_that_agree_train(tmp_path: Path) -> None:
    found = train_on_ranks({"folder": tmp_path, "facts": ["fine", "fine"], "max_steps": 2}, 2)
    assert [len(result["norms"]) for result in found] == [2, 2]


def test_two_that_do_not_are_told_what_and_which(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = {"folder": tmp_path, "facts": ["fine", "rain"], "max_steps": 2, "devices": 2, "strategy": "ddp"}
    assert run_ranks(fault_run.train, 2, options) == [1, 1]
    line = "ValueError: the ranks disagree on the weather: rank 0 has fine; rank 1 has rain; start all of them"
    assert capfd.readouterr().err.count(line) == 2
    assert not list(tmp_path.glob("result-*"))


def test_the_line_names_the_first_difference_and_counts_the_others() -> None:
    facts: list[dict[str, str]] = [{"a": "1", "b": "x", "c": "z"} for _ in range(7)]
    facts[2] |= {"b": "y" * 200, "c": "zz"}
    del facts[6]["c"]
    line = disagreement(facts)
    assert line.startswith("the ranks disagree on b, and 1 more: ranks 0, 1, 3, 4 and 2 more have x; rank 2 has yyy")
    assert len(line) < 300
    assert "\n" not in line


def test_one_process_compares_nothing() -> None:
    RankAgreement({"a": "1"}).on_fit_start(SimpleNamespace(world_size=1), None)  # type: ignore[arg-type]


def test_the_order_of_the_data_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    def gathered(value: Any) -> list[Any]:
        sent.append(value)
        return [value, "another" if isinstance(value, str) else {**value, "data.seed": "5"}]

    monkeypatch.setattr("callbacks.rank_agreement.gathered", gathered)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    data = RecallDataModule(num_pairs=2, vocab_size=16, seq_len=8, seed=3)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    data.setup()
    trainer: Any = SimpleNamespace(world_size=2, datamodule=data)
    with pytest.raises(ValueError, match=r"^the ranks disagree on data\.seed: rank 0 has 3; rank 1 has 5; start"):
        RankAgreement().on_fit_start(trainer, None)  # type: ignore[arg-type]
    assert {"data.corpus", "data.seed", "data.shuffle", "data.batch_size", "data.ranks", "data.num_workers"} <= set(sent[1])
