"""Training goes as it went: the first steps of a shipped config within the band that three seeds left."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def reference_curve() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_curve", FOLDER / "reference_curve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kept_band(config: str) -> list[dict[str, float]]:
    return json.loads((FOLDER / "results" / f"reference_{config}.json").read_text())["band"]


@pytest.mark.timeout(900)  # a minute and a half on an idle core
def test_a_run_of_cpu_tiny_stays_within_its_band(reference_curve: ModuleType, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    assert not reference_curve.outside(reference_curve.curve("cpu_tiny", 0, tmp_path), kept_band("cpu_tiny"))


@pytest.mark.gpu
def test_a_run_of_h100_125m_stays_within_its_band(reference_curve: ModuleType, tmp_path: Path) -> None:
    assert not reference_curve.outside(reference_curve.curve("h100_125m", 0, tmp_path), kept_band("h100_125m"))


def test_a_curve_that_leaves_the_band_is_named(reference_curve: ModuleType) -> None:
    band = reference_curve.band([[5.0, 4.0], [5.1, 3.9], [5.05, 3.95]])
    assert band == [{"to_step": 20, "low": 4.98, "high": 5.12}, {"to_step": 40, "low": 3.88, "high": 4.02}]
    assert reference_curve.outside([5.0, 4.0], band) == []
    assert reference_curve.outside([5.0, 4.1], band) == ["to step 40: 4.1000, not 3.8800 … 4.0200"]
    assert len(reference_curve.outside([float("nan"), 4.0], band)) == 1


def test_bands_are_narrow_enough_to_fail(reference_curve: ModuleType) -> None:
    """A network that learned nothing for one stretch of twenty steps would be outside."""
    band = kept_band("cpu_tiny")
    late = [(point["low"] + point["high"]) / 2 for point in band]
    assert reference_curve.outside([late[0], *late[:-1]], band)
    assert max(point["high"] - point["low"] for point in band) < 0.5
