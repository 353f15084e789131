"""benchmarks/kills.py: killed at random moments, also while a checkpoint is being written, runs end as if nothing had happened."""

import importlib
import json
import random
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ROOT, run_python


def killed(count: int, output: Path) -> dict[str, Any]:
    run_python(ROOT / "benchmarks" / "kills.py", "--kills", count, "--output", output, seconds=1800, cwd=output.parent)
    return json.loads(output.read_text())


def check(result: dict[str, Any], count: int) -> None:
    assert result["identical"] == result["kills"] == len(result["rows"]) == count
    for row in result["rows"]:
        assert row["unreadable"] == row["different"] == []
        assert 0 < row["resumed_from_step"] < result["steps"]
    assert {row["checkpoint_async"] for row in result["rows"]} == {True, False}


def test_the_rows_kept_are_of_runs_that_were_resumed() -> None:
    (kept,) = (ROOT / "benchmarks" / "results").glob("faults_kills_*.json")
    check(json.loads(kept.read_text()), 25)


def test_a_kill_after_the_last_checkpoint_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that came after the end; but one that left a file that cannot be read does."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("kills")
    left: list[int | None] = []

    def save(run: Path, step: int) -> None:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        torch.save(dict.fromkeys(script.COMPARED, 1) | {"global_step": step}, run / "checkpoints" / "last.ckpt")

    def kill_once(arguments: list[str], run: Path, delay: float, aimed: bool) -> float | None:
        if (step := left.pop(0)) is None:
            return None
        save(run, abs(step))
        if step < 0:
            (run / "checkpoints" / "step=000040-loss=1.ckpt").write_bytes(b"half")
        return delay

    monkeypatch.setattr(script, "kill_once", kill_once)
    monkeypatch.setattr(script, "finish", lambda arguments, log: save(log.with_suffix(""), 40))
    save(tmp_path / "straight", 40)

    def row(*steps: int | None) -> dict[str, Any]:
        left[:] = steps
        return script.killed_run(len(left), Namespace(steps=40), tmp_path, 1.0, random.Random(0))

    found = row(40, None, 40, 12, 4)
    assert (found["resumed_from_step"], found["identical"], left) == (12, True, [4])
    found = row(-40, 12)
    assert (found["unreadable"], found["identical"], left) == (["step=000040-loss=1.ckpt"], False, [12])


def test_a_run_that_ends_at_its_first_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Each of its kills would leave the last step."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    with pytest.raises(SystemExit):
        importlib.import_module("kills").main(["--steps", "2", "--output", str(tmp_path / "kills.json")])
    assert "--steps is 2, and the first checkpoint is of step 2; give at least 3" in capsys.readouterr().err


@pytest.mark.timeout(900)  # a quarter of a minute on idle cores
def test_three_killed_runs_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    check(killed(3, tmp_path / "kills.json"), 3)


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_25_killed_runs_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    result = killed(25, tmp_path / "kills.json")
    check(result, 25)
    assert result["while_writing"] > 0
