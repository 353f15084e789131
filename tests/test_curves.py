"""A run folder's curves as JSON: thinned, with the machine, without the folders of this one."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from mmrec.measuring.machine import device, machine

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "curves.py"
CONFIG = {
    "trainer": {"default_root_dir": "/home/me/runs/books", "max_steps": 200},
    "data": {
        "class_path": "datamodules.C4DataModule",
        "init_args": {
            "source": "local",
            "tokens_dir": "/data/tokens",
            "tokenizer": "../tokenizer.json",
            "train_files": ["/data/a/*.jsonl", "/data/b.jsonl"],
            "validation_files": {"books": "/data/books.jsonl", "code": ["/data/code.jsonl"]},
            "cache_dir": None,
        },
    },
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("curves", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_run_becomes_json(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, output = tmp_path / "run", tmp_path / "results" / "run.json"
    with SummaryWriter(run / "tb") as writer:
        for step in range(200):
            writer.add_scalar("train/loss", 5 - step / 100, step)
            writer.add_scalar("memory/rss", 7.0, step)
        writer.add_scalar("val/loss", 4.5, 0)
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    script.main([str(run), str(output)])
    assert capsys.readouterr().out == f"{output}\n"
    written = json.loads(output.read_text())
    assert written["steps"] == 200
    assert written["tags"] == ["memory/rss", "train/loss", "val/loss"]
    assert written["curves"].keys() == {"train/loss", "val/loss"}  # the rest only as it was at the end
    loss = written["curves"]["train/loss"]
    assert len(loss) == script.POINTS
    assert loss[0] == [0, 5.0]
    assert loss[-1] == [199, pytest.approx(5 - 1.99)]
    assert written["last"] == {"memory/rss": 7.0, "train/loss": pytest.approx(5 - 1.99), "val/loss": 4.5}
    assert written.keys() >= machine(device()).keys() | {"python", "lightning"}  # the place is named as in all results
    assert written["gpu"] == machine(device())["gpu"]
    assert str(tmp_path) not in output.read_text()


def test_only_the_names_of_files_are_kept(script: ModuleType) -> None:
    kept = script.without_folders(CONFIG)
    assert kept["trainer"] == {"default_root_dir": "books", "max_steps": 200}
    assert kept["data"] == {
        "class_path": "datamodules.C4DataModule",
        "init_args": {
            "source": "local",
            "tokens_dir": "tokens",
            "tokenizer": "tokenizer.json",
            "train_files": ["*.jsonl", "b.jsonl"],
            "validation_files": {"books": "books.jsonl", "code": ["code.jsonl"]},
            "cache_dir": None,
        },
    }


def test_a_folder_that_is_no_run_is_refused(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        script.main([str(tmp_path), str(tmp_path / "out.json")])
    assert end.value.code == 2
    assert "is no run folder: it has no tb/" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
