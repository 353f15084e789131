"""The study's command, in its form for a CPU."""

import json
from pathlib import Path

import pytest

from mmrec.scripts import train_uboo_test
from mmrec.scripts.train_uboo_test import main
from mmrec.studies.runs import Run
from mmrec.studies.training import Outcome, train


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
    assert all(len(entry["curves"]["val/loss"]) == 6 for entry in curves)  # on a part of the held-out text, the row's loss on all of it
    ends = {(entry["uboo"], entry["seed"]): entry["curves"]["val/loss"][-1] for entry in curves}
    assert all(ends[row["uboo"], row["seed"]] != [60, pytest.approx(row["val_loss"], abs=1e-4)] for row in rows)
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


def test_a_run_that_fails_is_named_and_the_others_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay = tmp_path / "nonsense.yaml"
    overlay.write_text("model: {network: {loss_chunk_size: 7}}\n")

    def fails(run: Run) -> Outcome:
        if run.variant == "nonsense":
            raise RuntimeError("out of luck")
        return train(run)

    output = tmp_path / "convergence.json"
    options = ["--quick", "--steps", "2", "--seeds", "0", "--arms", "mm-rec", str(overlay), "--output", str(output)]
    with monkeypatch.context() as patch:
        patch.setattr(train_uboo_test, "train", fails)
        assert main(options) == 1
    assert len(json.loads(output.read_text())) == 1
    assert "nonsense quick lr 0.003 seed 0: RuntimeError: out of luck" in capsys.readouterr().err

    assert main([*options, "--only-missing"]) == 0
    printed = capsys.readouterr().out
    assert f"1 of 2 runs are in {output}" in printed
    assert "[1/1] protocol mm-rec nonsense quick" in printed
    assert [row["variant"] for row in json.loads(output.read_text())] == [None, "nonsense"]


def test_a_run_that_diverges_is_said_to_and_costs_no_other_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overlay = tmp_path / "hot.yaml"
    overlay.write_text("model: {learning_rate: 1.0e+30, warmup_steps: 0}\n")
    output = tmp_path / "convergence.json"
    options = ("--quick", "--steps", "4", "--seeds", "0", "--output", str(output), "--arms")
    assert main([*options, str(overlay), "mm-rec"]) == 0
    assert {row["variant"]: row["val_loss"] is None for row in json.loads(output.read_text())} == {"hot": True, None: False}
    assert "  diverged  hot" in capsys.readouterr().out
    assert main([*options, "mm-rec"]) == 0  # the file is as good as before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: {network: {num_heads: 7}}", "protocol, mine: num_heads = 7 does not divide model_dim = 64"),
        ("model: {network: {num_head: 2}}", "protocol, mine: model.network has no option 'num_head'; did you mean 'num_heads'?"),
        ("model: {learning_rate: -1.0}", "protocol, mine: model.learning_rate is -1.0"),
        ("trainer: {max_steps: 3}", "mine.yaml holds trainer; an arm may change model: alone"),
        ("", "mine.yaml holds nothing"),
        ("model: {network: {vocab_size: 77}}", "the tokenizer has 1024 tokens but the network 77"),
    ],
)
def test_what_an_arm_cannot_mean_is_one_line_before_anything_is_trained(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(content + "\n")
    with pytest.raises(SystemExit) as end:
        main(["--quick", "--arms", "mm-rec", str(tmp_path / "mine.yaml"), "--output", str(tmp_path / "convergence.json")])
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "convergence.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "no CUDA device; --quick trains tiny networks on the CPU"),
        (("--quick", "--arms", "uboo_msi"), "no arm uboo_msi; did you mean uboo_mse?"),
        (("--quick", "--arms", "x/y.yaml"), "no arm x/y.yaml; give a YAML file, or one of mm-rec, "),
        (("--quick", "--plot-only", "--output", "none.json"), "--plot-only: no rows in none.json"),
        (("--stady", "protocol"), "unknown option --stady; did you mean --study?"),
        (("--quick", "--output", "nowhere/x.json"), "no folder nowhere"),
        (("--quick", "--seeds", "-1"), "'-1' is no seed; give a whole number from 0"),
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
