"""`export`, and `generate` from what it wrote."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from datamodules.tokenizer import load_tokenizer
from mmrec.commandline.checkpoints import load_network
from mmrec.pretrained import load_pretrained


def test_what_is_exported_is_the_network_and_writes_the_same_text(finished_run: Path, cli) -> None:
    ended = cli("export", "--run", str(finished_run), "--output", "shared/model")
    assert ended.code == 0, ended.err
    last = finished_run / "checkpoints" / "last.ckpt"
    assert ended.out.startswith(f"{last} at step 5: ")
    assert {path.name for path in Path("shared/model").iterdir()} == {"model.safetensors", "config.json", "tokenizer.json"}
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    expected = load_network(last, torch.device("cpu"))
    assert torch.equal(load_pretrained("shared/model")(tokens), expected(tokens))
    assert json.loads(Path("shared/model/config.json").read_text())["network"]["model_dim"] == 16
    assert load_tokenizer("shared/model/tokenizer.json").vocab_size == 300
    options = ["--prompt", "In the", "--max_new_tokens", "20", "--seed", "3"]
    written = [cli("generate", *source, *options) for source in (["--model", "shared/model"], ["--run", str(finished_run)])]
    assert [one.code for one in written] == [0, 0]
    assert written[0].out == written[1].out


def test_a_run_without_a_tokenizer_is_exported_without_one(finished_run: Path, cli) -> None:
    Path("run").mkdir()
    shutil.copytree(finished_run / "checkpoints", "run/checkpoints")
    ended = cli("export", "--run", "run", "--output", "model")
    assert ended.code == 0
    assert ended.err.startswith("without a tokenizer: no run/config.yaml to find the run's tokenizer by")
    assert {path.name for path in Path("model").iterdir()} == {"model.safetensors", "config.json"}
    assert cli("generate", "--model", "model").error == "no model/tokenizer.json; give the tokenizer of the run as --tokenizer"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "--run", "RUN"], "missing --output"),
        (["export", "--output", "model"], "give a run folder as --run ("),
        (["export", "--run", "none", "--output", "model"], "no checkpoint under none/checkpoints; run fit first or give another --run"),
        (["export", "--run", "RUN", "--output", "taken"], "output taken exists and is not an empty folder; name a new one"),
        (
            ["export", "--run", "RUN", "--output", "model", "--ckpt_path", "best"],
            "no best.ckpt under RUN/checkpoints: no validation has run",
        ),
        (["export", "--run", "RUN", "--output", "model", "--tokenizer", "none.json"], "no tokenizer file none.json"),
        (["generate", "--run", "RUN", "--model", "taken"], "give --model, or --run and --ckpt_path, not both"),
        (["generate", "--model", "taken"], "no taken/config.json; give a folder that `export` wrote"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arguments: list[str], message: str, finished_run: Path, cli) -> None:
    Path("taken").mkdir()
    Path("taken/file").touch()
    given = [str(finished_run) if argument == "RUN" else argument for argument in arguments]
    assert cli(*given).error.startswith(message.replace("RUN", str(finished_run)))
    assert not Path("model").exists()
