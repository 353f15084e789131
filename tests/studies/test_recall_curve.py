"""Recall against bytes of state: the count of answers, the bytes, the runs, and the command on a CPU."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from datamodules import RecallDataModule
from mmrec.baselines import BaselineConfig, BaselineModel
from mmrec.baselines.state import state_bytes
from mmrec.commandline.errors import BadInputError
from mmrec.scripts import recall_curve
from mmrec.studies.recall import RecallStudy, accuracy
from mmrec.studies.recall_report import best, table
from mmrec.studies.runs import Row
from mmrec.studies.training import _data, _module


class _Remembers(torch.nn.Module):
    """Looks the answer up; of every `forgets`-th example it knows nothing."""

    def __init__(self, vocab_size: int, forgets: int | None = None) -> None:
        super().__init__()
        self.vocab_size, self.forgets, self.seen = vocab_size, forgets, 0

    def forward(self, input_ids: Tensor) -> Tensor:
        logits = torch.zeros(*input_ids.shape, self.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            self.seen += 1
            if self.forgets and self.seen % self.forgets == 0:
                continue  # token 0 is the likeliest, and no answer
            pairs: dict[int, int] = {}
            for position, (token, following) in enumerate(zip(ids, [*ids[1:], 0], strict=True)):
                if token in pairs:
                    logits[row, position, pairs[token]] = 1.0
                elif 0 < token < self.vocab_size // 2:
                    pairs[token] = following
        return logits


def test_accuracy_counts_the_labelled_positions_alone() -> None:
    data = RecallDataModule(seq_len=24, num_pairs=4, vocab_size=20, batch_size=8, validation_examples=20)
    data.setup()
    assert accuracy(_Remembers(20), data.val_dataloader()) == 1.0
    assert accuracy(_Remembers(20, forgets=2), data.val_dataloader()) == 0.5
    assert accuracy(_Remembers(20, forgets=1), data.val_dataloader()) == 0.0


def test_bytes_of_state_by_hand() -> None:
    sizes = {"model_dim": 128, "num_layers": 2, "num_heads": 2, "ffn_dim": 256, "vocab_size": 10}
    assert state_bytes(BaselineConfig(kind="transformer++", **sizes), 3, 512) == 3 * 2 * 2 * 512 * 128 * 2  # 2 layers; K and V; bf16
    # 2 heads of 48 keys by 96 values in fp32, and the last 4 of 96 + 96 + 192 channels in bf16
    assert state_bytes(BaselineConfig(kind="gated-deltanet", **sizes), 1, 512) == 2 * (2 * 48 * 96 * 4 + 4 * 384 * 2)
    assert state_bytes(BaselineConfig(kind="gla", **sizes), 1, 9) == 2 * (2 * 32 * 64 * 4)


def test_a_baseline_s_hidden_states_are_what_its_head_reads() -> None:
    model = BaselineModel(BaselineConfig(vocab_size=30, model_dim=16, num_layers=1, num_heads=2, ffn_dim=16))
    ids = torch.randint(30, (2, 5))
    assert torch.equal(model.head(model.hidden_states(ids)[0]), model(ids))


def test_every_run_of_the_study_can_be_built() -> None:
    study = RecallStudy(arms=("mm-rec", "transformer++", "uboo_mse"), seeds=(0, 1))
    runs = study.runs()
    networks = [(run.model, run.variant, run.network.model_dim, run.network.num_heads) for run in runs]
    heads = [(64, 1), (128, 2), (128, 1), (256, 4), (256, 2), (256, 1), (512, 8), (512, 4), (512, 2)]
    once = [("mm-rec", None, *size) for size in heads] + [("transformer++", None, width, width // 64) for width in (64, 128, 256, 512)]
    once += [("mm-rec", "uboo_mse", *size) for size in heads]
    assert networks == once * 6
    assert len({(run.title) for run in runs}) == len(runs)
    assert {run.steps * 64 for run in runs} == {_data(run).train_examples for run in runs} == {640_000}
    for run in runs[: len(once)]:
        data = _data(run)
        data.check()
        assert (data.seq_len, data.num_pairs, data.vocab_size) == (512, 64, 8192) == (512, 64, run.network.vocab_size)
        with torch.device("meta"):
            network = _module(run).network
        assert network.use_uboo == (run.variant == "uboo_mse")
        assert run.network.num_layers == 2
    with pytest.raises(BadInputError, match=r"^no head of 64 channels divides a width of 96"):
        RecallStudy(widths=(96,), head_widths=(64,)).runs()
    with pytest.raises(BadInputError, match=r"^no arm nothing; give a YAML file, or one of mm-rec, "):
        RecallStudy(arms=("nothing",)).runs()


def _row(**values: object) -> Row:
    row = {"model": "mm-rec", "variant": None, "model_dim": 64, "num_heads": 1, "state_bytes": 100, "params_m": 1.0, "lr": 1e-3, "seed": 0}
    task = {"seq_len": 512, "num_pairs": 64, "vocab_size": 8192, "steps": 9, "batch_tokens": 9, "num_layers": 2, "gpu": "H100"}
    return row | task | {"accuracy": 0.5} | values


def test_the_best_learning_rate_is_that_of_the_mean_over_seeds() -> None:
    wide = {"model_dim": 128, "state_bytes": 400}
    rows = [
        _row(lr=1e-3, accuracy=0.9), _row(lr=1e-3, accuracy=0.2, seed=1),
        _row(lr=3e-3, accuracy=0.8), _row(lr=3e-3, accuracy=0.6, seed=1),
        _row(**wide, accuracy=0.992), _row(**wide, lr=3e-3, accuracy=0.3),
        _row(model="transformer++", state_bytes=50, accuracy=0.98),
    ]  # fmt: skip
    found = best(rows)
    assert [(network.arm, network.state_bytes, pytest.approx(network.accuracy), network.rows[0]["lr"]) for network in found] == [
        ("transformer++", 50, 0.98, 1e-3),
        ("mm-rec", 100, 0.7, 3e-3),
        ("mm-rec", 400, 0.992, 1e-3),
    ]
    printed = table(rows)
    assert "mm-rec: 400 bytes a sequence is the smallest state measured that recalls 99 % (D 128, H 1)" in printed
    assert "transformer++: no state measured recalls 99 %; the most is 98.00 % with 50 bytes" in printed
    assert "mm-rec: 400 bytes a sequence is the only state measured, and recalls at least 99 % (D 128, H 1)" in table(
        [_row(**wide, accuracy=0.992)]
    )
    assert len(table([*rows, _row(steps=10)]).splitlines()) == len(printed.splitlines()) + 4  # another setting is not compared


def test_the_command_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    Path("narrow.yaml").write_text("model: {network: {pe_dim: 8}}\n")
    arms = ["--arms", "mm-rec", "transformer++", "narrow.yaml"]
    options = ["--quick", "--head-widths", "16", "--output", "rows.json"]
    assert recall_curve.main([*arms, *options, "--steps", "12"]) == 0
    rows = json.loads(Path("rows.json").read_text())
    assert [(row["model"], row["variant"], row["model_dim"], row["num_heads"]) for row in rows] == [
        ("mm-rec", None, 32, 2),
        ("transformer++", None, 32, 2),
        ("mm-rec", "narrow", 32, 2),
    ]
    for row in rows:
        assert 0 <= row["accuracy"] <= 1
        assert row["val_loss"] > 0
        assert (row["study"], row["steps"], row["batch_tokens"], row["lr"], row["seed"]) == ("recall", 12, 512, 1e-2, 0)
        assert row["gpu"].startswith("cpu: ")
    assert rows[0]["state_bytes"] == 4 * 2 * (32 + 32 * 16)
    assert rows[1]["state_bytes"] == 2 * 2 * 2 * 16 * 32
    assert rows[2]["params_m"] < rows[0]["params_m"]
    printed = capsys.readouterr().out
    assert "mm-rec: no state measured recalls 99 %" in printed

    assert recall_curve.main(["--arms", "mm-rec", *options, "--steps", "12"]) == 0  # the same run once more
    again = json.loads(Path("rows.json").read_text())
    assert again[2]["accuracy"] == rows[0]["accuracy"]
    assert len(again) == 3
    assert recall_curve.main(["--arms", "mm-rec", *options, "--steps", "12", "--only-missing", "--seeds", "0", "1"]) == 0
    assert "1 of 2 runs are in rows.json\n[1/1] recall mm-rec D 32 H 2 lr 0.01 seed 1" in capsys.readouterr().out
    assert recall_curve.main(["--plot-only", "--output", "rows.json"]) == 0
    assert "narrow, D 32, H 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quick", "--num-pairs", "9"], "data.vocab_size=16 is too small for 9 pairs: give at least 20"),
        (["--quick", "--widths", "40"], "no head of 16, 32 channels divides a width of 40; give others with --head-widths"),
        (["--widths", "0"], "--widths: '0' is no whole number of at least 1"),
        (["--width", "64"], "unknown option --width; did you mean --widths?"),
    ],
)
def test_bad_options_are_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        recall_curve.main([*options, "--output", "rows.json"])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_whole_curve_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        recall_curve.main([])
    assert "no CUDA device; --quick trains tiny networks on the CPU" in capsys.readouterr().err
