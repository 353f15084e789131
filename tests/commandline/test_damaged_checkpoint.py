"""The newest checkpoint damaged in every way: `last` names it and goes on from the one before; a file that was named is refused."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from cli_support import event_files, scalars, scalars_of
from processes import run_python

from mmrec.checkpoint_files import copies

CASES = ("truncated", "flipped", "emptied", "removed")


@pytest.fixture
def run(finished_run: Path) -> Path:
    """A run of five steps with checkpoints of steps 4 and 5, the links between them kept."""
    subprocess.run(["cp", "-a", str(finished_run), "run"], check=True)
    assert [path.name[:11] for path in copies(Path("run/checkpoints"))] == ["step=000005", "step=000004"]
    assert os.path.samefile("run/checkpoints/last.ckpt", copies(Path("run/checkpoints"))[0])
    return Path("run")


def damage(path: Path, how: str) -> None:
    """Damage a file in place, so that every name of it is damaged; `removed` takes `last.ckpt` away as well."""
    size = path.stat().st_size
    if how == "removed":
        path.unlink()
        (path.parent / "last.ckpt").unlink(missing_ok=True)
    elif how == "flipped":
        with open(path, "r+b") as file:
            file.seek(size // 2)
            byte = file.read(1)[0]
            file.seek(size // 2)
            file.write(bytes([byte ^ 1]))
    else:
        os.truncate(path, size // 2 if how == "truncated" else 0)


@pytest.mark.parametrize("how", CASES)
def test_fit_goes_on_from_the_one_before(how: str, run: Path, tiny_config: Path, finished_run: Path, cli) -> None:
    newest, before = copies(run / "checkpoints")
    damage(newest, how)
    ended = cli("fit", "--config", str(tiny_config), "--trainer.default_root_dir", "run", "--ckpt_path", "last")
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    fault = "is gone" if how == "removed" else r"is damaged or no checkpoint \(.*\)"
    assert re.fullmatch(rf"warning: .*run/checkpoints/last\.ckpt {fault}: using the one before, {re.escape(before.name)}", lines[0])
    assert f"resumed from step 4: {before}" in lines
    # TensorBoard's curves and the parameters are those of the run that was not damaged.
    second = event_files(run)[1]
    assert set(scalars_of(second, "train/loss")) == {4}
    assert scalars(run, "train/loss") == scalars(finished_run, "train/loss")
    weights = [torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for folder in (run, finished_run)]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    # What was damaged is out of the way: it would be kept in the place of a whole one.
    aside = set() if how == "removed" else {f"{newest.name}.damaged", "last.ckpt.damaged"}
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.ckpt", newest.name, before.name} | aside


@pytest.mark.parametrize("how", ["truncated", "emptied"])
def test_where_none_is_whole_nothing_is_begun(how: str, run: Path, tiny_config: Path, cli) -> None:
    for path in copies(run / "checkpoints"):
        damage(path, how)
    listed = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    ended = cli("fit", "--config", str(tiny_config), "--trainer.default_root_dir", "run", "--ckpt_path", "last")
    assert ended.error.startswith("no checkpoint under run/checkpoints can be read: checkpoint run/checkpoints/last.ckpt is damaged")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == listed


@pytest.mark.parametrize("how", CASES)
def test_a_named_file_is_refused_and_not_replaced(how: str, run: Path, tiny_config: Path, cli) -> None:
    newest = copies(run / "checkpoints")[0]
    damage(newest, how)
    listed = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    ended = cli("fit", "--config", str(tiny_config), "--trainer.default_root_dir", "run", "--ckpt_path", str(newest))
    assert ended.error.startswith(f"no checkpoint {newest}; give a file" if how == "removed" else f"checkpoint {newest} is damaged")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == listed


def test_a_damaged_best_one_says_what_is_whole(run: Path, tiny_config: Path, cli) -> None:
    options = ("--config", str(tiny_config), "--trainer.default_root_dir", "run", "--ckpt_path", "best")
    shutil.copyfile(run / "checkpoints" / "last.ckpt", run / "checkpoints" / "best.ckpt")
    damage(run / "checkpoints" / "best.ckpt", "truncated")
    for command in ("validate", "fit"):
        assert cli(command, *options).error.endswith("; give --ckpt_path last, which takes run/checkpoints/last.ckpt")
    assert cli("generate", "--run", "run", "--ckpt_path", "best").error.endswith("which takes run/checkpoints/last.ckpt")


def test_what_only_reads_takes_the_one_before_and_leaves_the_files_alone(run: Path, tiny_config: Path, cli) -> None:
    newest, before = copies(run / "checkpoints")
    damage(newest, "truncated")
    listed = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").iterdir()}
    validated = cli("validate", "--config", str(tiny_config), "--trainer.default_root_dir", "run")
    assert f"reading {before}\n" in validated.out
    assert "warning: checkpoint run/checkpoints/last.ckpt is damaged" in validated.out
    written = cli("generate", "--run", "run", "--max_new_tokens", "3", "--temperature", "0")
    assert written.code == 0
    assert written.err.startswith("warning: checkpoint run/checkpoints/last.ckpt is damaged")
    assert written.out == cli("generate", "--ckpt_path", str(before), "--max_new_tokens", "3", "--temperature", "0").out
    assert {path: path.stat().st_mtime_ns for path in (run / "checkpoints").iterdir()} == listed


@pytest.mark.faults
def test_two_ranks_take_the_same_one(run: Path, tiny_config: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(tiny_config.read_text())
    content["trainer"] |= {"devices": 2, "strategy": "ddp"}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(content))
    shutil.rmtree("run")

    def fit(*options: str) -> str:
        return run_python("-m", "mmrec.cli", "fit", "--config", "two.yaml", "--trainer.default_root_dir", "run", *options).stdout

    fit("--trainer.max_steps", "5")
    newest, before = copies(run / "checkpoints")
    damage(newest, "flipped")
    said = fit("--trainer.max_steps", "6", "--ckpt_path", "last")
    assert said.count(f"using the one before, {before.name}") == 1
    assert f"resumed from step 4: {before}" in said
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6
