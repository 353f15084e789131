"""A study's files: rows that replace their like, curves beside them, steps to the baseline's loss."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmrec.studies.report import StudyFile, summary


def row(**changes: Any) -> dict[str, Any]:
    fields = {"study": "uboo", "model": "mm-rec", "variant": None, "params_m": 35.0, "batch_tokens": 8192, "steps": 100, "lr": 1e-3}
    fields |= {
        "size": "35m",
        "trained_on": "books",
        "seq_len": 2048,
        "seed": 0,
        "uboo": "off",
        "orthogonalize": None,
        "lambda_P": None,
        "gpu": "H100",
        "val_loss": 4.0,
        "steps_to_baseline": None,
    }
    return fields | changes


def falling(end: float) -> dict[str, list[tuple[int, float]]]:
    return {"val/loss": [(0, 10.0), (50, end + 1), (100, end)], "train/loss_main": [(0, 10.0), (100, end)]}


def test_a_run_again_replaces_its_row_and_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "convergence.json"
    file = StudyFile(path)
    file.add(row(val_loss=4.1), falling(4.1))
    file.add(row(seed=1), falling(4.0))
    StudyFile(path).add(row(val_loss=3.9), falling(3.9))
    rows = json.loads(path.read_text())
    assert sorted((found["seed"], found["val_loss"]) for found in rows) == [(0, 3.9), (1, 4.0)]
    again = StudyFile(path)
    assert again.curve(rows[-1], "val/loss")[-1] == (100, 3.9)
    assert len(json.loads(again.curves_path.read_text())) == 2


def test_steps_to_the_baselines_loss_are_counted_from_the_mean_of_its_seeds(tmp_path: Path) -> None:
    file = StudyFile(tmp_path / "convergence.json")
    file.add(row(), falling(4.1))
    file.add(row(seed=1), falling(3.9))
    file.add(row(variant="better", uboo="mse", lambda_P=0.1), falling(3.5))
    file.add(row(variant="worse", uboo="mse", lambda_P=0.2), falling(4.5))
    file.add(row(study="lr_grid", variant="elsewhere"), falling(1.0))
    found = {(r["study"], r["variant"], r["seed"]): r["steps_to_baseline"] for r in file.rows}
    assert found[("uboo", "better", 0)] == 75  # 4.5 at 50, 3.5 at 100, and the baseline ends at 4.0
    assert found[("uboo", "worse", 0)] is None
    assert found[("uboo", None, 1)] == 95
    assert found[("lr_grid", "elsewhere", 0)] is None  # no baseline in its study


def test_the_baseline_is_that_of_its_best_learning_rate_and_of_the_same_size_and_data(tmp_path: Path) -> None:
    file = StudyFile(tmp_path / "convergence.json")
    file.add(row(lr=1e-3), falling(4.0))
    file.add(row(lr=3e-3), falling(6.0))
    file.add(row(size="120m", params_m=125.0), falling(2.0))
    file.add(row(trained_on="c4"), falling(1.0))
    file.add(row(variant="better", uboo="mse", lambda_P=0.1), falling(3.5))
    assert [r["steps_to_baseline"] for r in file.rows if r["variant"] == "better"] == [75]
    assert len(file.rows) == 5
    assert "2 seeds" not in summary(file.rows)


def test_a_diverged_run_is_kept_and_hides_nothing(tmp_path: Path) -> None:
    nan = float("nan")
    path = tmp_path / "convergence.json"
    file = StudyFile(path)
    file.add(row(val_loss=nan), {"val/loss": [(0, 10.0), (50, nan), (100, nan)]})
    file.add(row(variant="better", uboo="mse", lambda_P=0.1, val_loss=3.5), falling(3.5))
    again = StudyFile(path)
    assert again.curve(again.rows[0], "val/loss") == [(0, 10.0)]
    assert [r["steps_to_baseline"] for r in again.rows] == [None, None]  # the baseline has no end
    assert summary(again.rows).splitlines()[1:] == ["  3.5000  better, lr 0.001, 35.0 M", "  diverged  mm-rec, lr 0.001, 35.0 M"]
    assert len(again.draw()) == 1


def test_in_the_finals_the_transformer_is_the_baseline(tmp_path: Path) -> None:
    file = StudyFile(tmp_path / "convergence.json")
    file.add(row(study="finalist", model="transformer++", uboo=None), falling(4.0))
    file.add(row(study="finalist"), falling(3.5))
    assert [r["steps_to_baseline"] for r in file.rows] == [100, 75]


def test_the_summary_has_the_lowest_loss_first_and_the_range_of_seeds() -> None:
    theirs = row(model="transformer++", variant="better", uboo=None, val_loss=4.3)
    text = summary([row(), row(seed=1, val_loss=4.2), row(variant="better", val_loss=3.9), theirs])
    lines = text.splitlines()
    assert lines[0] == "uboo: 100 steps of 8,192 tokens, 35m, books, H100"
    assert lines[1].startswith("  3.9000  better, lr 0.001")
    assert lines[2].startswith("  4.1000 (4.0000 … 4.2000, 2 seeds)  mm-rec")
    assert lines[3].startswith("  4.3000  transformer++, better, lr 0.001")


def test_plots_show_every_setting(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = StudyFile(tmp_path / "convergence.json")
    file.add(row(), falling(4.1))
    file.add(row(seed=1), falling(3.9))
    file.add(row(steps=200), falling(3.0))
    file.add(row(gpu="A100"), falling(3.0))
    lines = file.draw()
    assert len(set(lines)) == 3
    for line in lines:
        assert Path(line.removeprefix("plot: ")).stat().st_size > 10_000
