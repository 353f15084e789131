"""benchmarks/checkpoint_stall.py: what it sums up, and that it runs."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("checkpoint_stall", FOLDER / "checkpoint_stall.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_lost_is_counted_against_the_stretches_without_a_checkpoint(script: ModuleType) -> None:
    seconds = {"none": [10.0, 10.5, 9.0], "background": [10.3, 10.1], "waited_for": [14.0, 12.0]}
    rows = [{"kind": kind, "seconds": value, "held_up_s": 0.5} for kind, values in seconds.items() for value in values]
    found = script.summary(rows, 100)
    assert found["step_s"] == pytest.approx(0.1)
    assert found["spread_of_plain_stretches"] == pytest.approx(0.1)
    assert found["background"] == pytest.approx({"lost_s": 0.2, "lost_steps": 2.0, "lost_share": 0.02, "held_up_s": 0.5})
    assert found["waited_for"]["lost_share"] == pytest.approx(0.3)


@pytest.mark.filterwarnings("ignore")
def test_it_measures_stretches_of_each_kind(script: ModuleType, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    script.main(
        ["--steps", "2", "--repeats", "1", "--batch-size", "1", "--folder", str(tmp_path), "--output", str(tmp_path / "stall.json")]
    )
    result = json.loads((tmp_path / "stall.json").read_text())
    assert [row["kind"] for row in result["stretches"]] == ["none", "background", "waited_for", "none"]
    assert all(row["seconds"] > 0 for row in result["stretches"])
    assert [row["written_after_s"] is not None for row in result["stretches"]] == [False, True, True, False]
    assert result["tokens_a_step"] == 128
    assert result.keys() >= {"gpu", "torch", "triton", "date", "python", "lightning"}
    assert result["checkpoint_mib"] == pytest.approx(12 * result["parameters"] / 2**20, rel=0.05)
    assert [path.name for path in tmp_path.iterdir()] == ["stall.json"]
