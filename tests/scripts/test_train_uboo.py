"""The study's command, in its form for a CPU."""

import json
from pathlib import Path

import pytest

from mmrec.scripts.train_uboo_test import main


def test_a_quick_study_trains_three_arms_with_two_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "convergence.json"
    assert main(["--quick", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())
    assert {(row["uboo"], row["seed"]) for row in rows} == {(uboo, seed) for uboo in ("off", "mse", "normalized") for seed in (0, 1)}
    for row in rows:
        assert row["study"] == "protocol"
        assert row["steps"] == 60
        assert 4 < row["val_loss"] < 6.5  # from ln 1,024 = 6.93
        assert row["loss_variance"] > 0
        assert (row["grad_cosine"] is None) == (row["target_variance"] is None) == (row["uboo"] == "off")
    curves = json.loads((tmp_path / "curves_of_convergence.json").read_text())
    assert all(len(entry["curves"]["val/loss"]) >= 6 for entry in curves)
    # The same seed is the same start and the same data: the arms begin alike.
    starts = {(entry["uboo"], entry["seed"]): entry["curves"]["train/loss_main"][0][1] for entry in curves}
    assert starts[("off", 0)] == starts[("mse", 0)] == starts[("normalized", 0)] != starts[("off", 1)]
    printed = capsys.readouterr().out
    assert "protocol: 60 steps of 512 tokens" in printed
    assert "plot: " in printed


def test_a_baseline_takes_part(tmp_path: Path) -> None:
    output = tmp_path / "convergence.json"
    options = ("--study", "finalist", "--steps", "3", "--seeds", "0", "--output", str(output))
    assert main(["--quick", *options]) == 0
    assert [(row["model"], row["uboo"]) for row in json.loads(output.read_text())] == [("mm-rec", "off"), ("transformer++", None)]


def test_a_run_that_fails_is_named_and_the_others_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overlay = tmp_path / "nonsense.yaml"
    overlay.write_text("model: {network: {num_heads: 7}}\n")
    output = tmp_path / "convergence.json"
    assert main(["--quick", "--steps", "2", "--seeds", "0", "--arms", "mm-rec", str(overlay), "--output", str(output)]) == 1
    assert len(json.loads(output.read_text())) == 1
    assert "nonsense" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "no CUDA device; --quick trains tiny networks on the CPU"),
        (("--quick", "--arms", "uboo_msi"), "no arm uboo_msi; give mm-rec"),
        (("--stady", "protocol"), "unknown option --stady; did you mean --study?"),
        (("--quick", "--output", "nowhere/x.json"), "no folder nowhere"),
    ],
)
def test_bad_options_are_one_line(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(options)
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.iterdir())
