"""The document's tables of what the state is worth: recall, and long texts."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_document import PLACE, written


def recall_row(**values: Any) -> dict[str, Any]:
    row = {"model": "mm-rec", "variant": None, "model_dim": 128, "num_heads": 1, "state_bytes": 132096, "params_m": 2.5, "lr": 3e-3}
    task = {"seq_len": 512, "num_pairs": 64, "vocab_size": 8192, "steps": 10000, "batch_tokens": 32768, "num_layers": 2, "seed": 0}
    return row | task | {"accuracy": 1.0} | PLACE | values


def test_recall_is_told_at_the_best_learning_rate(document: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        recall_row(), recall_row(accuracy=0.99, seed=1), recall_row(lr=1e-3, accuracy=0.5), recall_row(gpu="cpu: AMD EPYC", model_dim=32),
        recall_row(model_dim=64, state_bytes=66048, accuracy=0.4), recall_row(variant="window_every_2", accuracy=0.995, state_bytes=200000),
        recall_row(model="transformer++", state_bytes=524288, accuracy=0.013),
    ]  # fmt: skip
    made = written(document, tmp_path, recall_h100=rows)
    assert "64 pairs in 512 tokens of 8,192, 2 layers, 10,000 steps of 32,768 tokens, NVIDIA H100 80GB HBM3:" in made
    lines = [line for line in made.splitlines() if line.startswith(("| mm-rec |", "| transformer++ |"))]
    assert lines == [
        "| mm-rec | – | 64 | 1 | 66,048 | 40.00 | 2.5 | 0.003 | 1 |",
        "| mm-rec | – | 128 | 1 | 132,096 | 99.50 (99.00 … 100.00) | 2.5 | 0.003 | 2 |",
        "| mm-rec | window_every_2 | 128 | 1 | 200,000 | 99.50 | 2.5 | 0.003 | 1 |",
        "| transformer++ | – | 128 | 1 | 524,288 | 1.30 | 2.5 | 0.003 | 1 |",
    ]
    assert "mm-rec: 132,096 bytes a sequence is the smallest state measured that recalls 99 % (D 128, H 1); " in made
    assert "transformer++: no state measured recalls 99 %; the most is 1.30 % with 524,288 bytes. Measured on " in made
    assert "written by `python -m mmrec.scripts.recall_curve --output benchmarks/results/recall_h100.json`." in made
    assert "| 1.2.1 Recall | NVIDIA H100 80GB HBM3" in made
    assert "recall_h100.json: used" in capsys.readouterr().out


def test_long_texts_are_told_by_position(document: ModuleType, tmp_path: Path) -> None:
    common = {
        "model": "mm-rec", "variant": None, "params_m": 35.0, "tokens_m": 98.14, "trained_on": "books", "lr": 1.5e-3, "seed": 0,
        "length": 16384, "trained_length": 2048, "windows": 90, "books": 12, "standard_error": 0.04, "rise_standard_error": 0.01,
    }  # fmt: skip
    none = {"over_restarted": None, "over_restarted_standard_error": None}
    carried = {"over_restarted": -0.0123, "over_restarted_standard_error": 0.001}
    rows = [
        {"what": "bin", "position_from": 1024, "position_to": 2048, "loss": 4.1, "rise": 0.0, **none},
        {"what": "bin", "position_from": 2048, "position_to": 4096, "loss": 4.05, "rise": -0.05, **carried},
        {"what": "far", "position_from": 12288, "position_to": 16384, "loss": 4.06, "rise": -0.04, **carried},
    ]
    diverged = common | rows[2] | {"variant": "other", "rise": None, "over_restarted": None, "loss": None} | PLACE
    made = written(document, tmp_path, length_h100=[*(common | row | PLACE for row in rows), diverged])
    assert "mm-rec, 35 M, 98 M tokens of books, lr 0.0015, seed 0, read 16,384 at a time on NVIDIA H100 80GB HBM3:" in made
    assert "| 1,024–2,047 | 4.1000 ± 0.0400 | +0.0000 ± 0.0100 | – |" in made
    assert "| 2,048–4,095 | 4.0500 ± 0.0400 | −0.0500 ± 0.0100 | −0.0123 ± 0.0010 |" in made
    assert "| 12,288" not in made  # a sentence, and no line
    assert (
        "*At 12,288–16,383 the loss is lower (−0.0400 ± 0.0100) than that at 1,024–2,047 of the same 90 windows of 12 books, and is lower "
        "(−0.0123 ± 0.0010) than that of the same tokens, read anew every 2,048.*"
    ) in made
    assert "*At 12,288–16,383 the loss is no number, not to be compared with that at 1,024–2,047 " in made
    assert "[length_h100.json](../benchmarks/results/length_h100.json), written by `python -m mmrec.scripts.length_curve --books " in made
