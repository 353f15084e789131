"""benchmarks/kills.py: killed at random moments, also while a checkpoint is being written, runs end as if nothing had happened."""

import json
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, run_python


def killed(count: int, output: Path) -> dict[str, Any]:
    run_python(ROOT / "benchmarks" / "kills.py", "--kills", count, "--output", output, seconds=1800, cwd=output.parent)
    return json.loads(output.read_text())


def check(result: dict[str, Any], count: int) -> None:
    assert result["identical"] == result["kills"] == len(result["rows"]) == count
    for row in result["rows"]:
        assert row["unreadable"] == row["different"] == []
        assert 0 < row["resumed_from_step"] <= result["steps"]  # the last, where the kill came between its checkpoint and the end
    assert {row["checkpoint_async"] for row in result["rows"]} == {True, False}


@pytest.mark.timeout(900)  # a quarter of a minute on idle cores
def test_three_killed_runs_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    check(killed(3, tmp_path / "kills.json"), 3)


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_25_killed_runs_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    result = killed(25, tmp_path / "kills.json")
    check(result, 25)
    assert result["while_writing"] > 0
