"""What `predict` writes: a line a sequence with its index, a file a process, and nothing of an earlier call beside it."""

import json
from pathlib import Path

import torch
import yaml
from processes import run_python

from mmrec.commandline.predictions import write_predictions


def rows_of(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def batches(*losses: list[float]) -> list[dict[str, torch.Tensor]]:
    return [{"loss": torch.tensor(batch), "num_tokens": torch.full((len(batch),), 7)} for batch in losses]


def test_a_line_holds_the_index_of_its_sequence(tmp_path: Path) -> None:
    path = write_predictions(tmp_path, batches([0.5, 1.5], [2.5]), rank=1, world_size=3)
    assert path == tmp_path / "predictions.1.jsonl"
    assert rows_of(path) == [{"index": index, "loss": loss, "num_tokens": 7} for index, loss in ((1, 0.5), (4, 1.5), (7, 2.5))]
    alone = write_predictions(tmp_path, batches([0.5], [1.5]), rank=0, world_size=1)
    assert alone == tmp_path / "predictions.jsonl"
    assert [row["index"] for row in rows_of(alone)] == [0, 1]


def test_files_of_another_number_of_processes_go_and_others_stay(tmp_path: Path) -> None:
    kept = {"predictions_mine.jsonl", "predictions.old.jsonl"}
    for name in kept:
        (tmp_path / name).touch()
    for ranks, order in ((3, [2, 0, 1]), (1, [0]), (2, [1, 0])):  # in any order of the ranks
        for rank in order:
            write_predictions(tmp_path, batches([1.0]), rank, ranks)
        wanted = {"predictions.jsonl"} if ranks == 1 else {f"predictions.{rank}.jsonl" for rank in range(ranks)}
        assert {path.name for path in tmp_path.iterdir()} == wanted | kept


def test_two_processes_write_what_one_does_and_both_files_are_named(finished_run: Path, tiny_config: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(tiny_config.read_text())
    content["trainer"] |= {"devices": 2, "strategy": "ddp", "default_root_dir": str(tmp_path / "run")}
    config, checkpoint = tmp_path / "two.yaml", finished_run / "checkpoints" / "last.ckpt"
    config.write_text(yaml.safe_dump(content))
    options = ("predict", "--config", str(config), "--ckpt_path", str(checkpoint))
    run_python("-m", "mmrec.cli", *options, "--trainer.devices", "1", "--trainer.strategy", "auto", "--data.validation_batches", "4")
    alone = rows_of(tmp_path / "run" / "predictions.jsonl")
    said = run_python("-m", "mmrec.cli", *options, "--data.validation_batches", "2").stdout
    files = [tmp_path / "run" / f"predictions.{rank}.jsonl" for rank in (0, 1)]
    assert f"predictions: {files[0]} … {files[1]}, one line a sequence, a file a process" in said
    assert sorted((tmp_path / "run").glob("predictions*")) == files
    together = sorted((row for file in files for row in rows_of(file)), key=lambda row: row["index"])
    assert [row["index"] for row in together] == [row["index"] for row in alone] == list(range(len(alone)))
    assert torch.allclose(torch.tensor([row["loss"] for row in together]), torch.tensor([row["loss"] for row in alone]), atol=1e-5)
