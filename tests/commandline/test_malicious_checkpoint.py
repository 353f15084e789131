"""A checkpoint that would run code when it is loaded is refused by every command, and its code does not run."""

import shutil
from pathlib import Path

import pytest
import torch

RUN = ["--trainer.default_root_dir", "run"]
COMMANDS = {
    "fit": ["fit", *RUN, "--ckpt_path"],
    "validate": ["validate", *RUN, "--ckpt_path"],
    "test": ["test", *RUN, "--ckpt_path"],
    "predict": ["predict", *RUN, "--ckpt_path"],
    "generate": ["generate", "--run", "run", "--prompt", "a", "--ckpt_path"],
    "export": ["export", "--run", "run", "--output", "model", "--ckpt_path"],
}


class Canary:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("canary").absolute(),)


@pytest.mark.parametrize(("named", "place"), [("last", "state_dict"), ("best", "hyper_parameters"), ("file", "optimizer_states")])
@pytest.mark.parametrize("command", COMMANDS)
def test_the_canary_is_never_written(command: str, named: str, place: str, finished_run: Path, tiny_config: Path, cli) -> None:
    checkpoint = torch.load(finished_run / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint[place] = {"weights": Canary()}
    folder = Path("run/checkpoints")
    folder.mkdir(parents=True)
    shutil.copy(finished_run / "config.yaml", "run")
    path = folder / ("evil.ckpt" if named == "file" else f"{named}.ckpt")
    torch.save(checkpoint, path)
    arguments = [*COMMANDS[command], str(path) if named == "file" else named]
    if RUN[0] in arguments:
        arguments += ["--config", str(tiny_config)]
    assert cli(*arguments).error == f"checkpoint {path} is refused: it holds more than tensors and plain types"
    assert not Path("canary").exists()
    torch.load(path, weights_only=False)
    assert Path("canary").exists()  # it could have been


def test_nothing_in_the_repository_loads_a_checkpoint_in_another_way() -> None:
    """All reading goes through mmrec.files.read_checkpoint."""
    root = Path(__file__).parents[2]
    folders = ("mmrec", "lightning_modules", "datamodules", "callbacks", "benchmarks")
    sources = [path for folder in folders for path in (root / folder).rglob("*.py")]
    calls = ("torch.load(", "pickle.load", "load_from_checkpoint(")
    found = {(path.relative_to(root).as_posix(), call) for path in sources for call in calls if call in path.read_text(encoding="utf-8")}
    assert found == {("mmrec/files.py", "torch.load(")}
