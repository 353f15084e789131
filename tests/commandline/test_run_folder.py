"""What a run writes and where, and how the next start finds it."""

import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from cli_support import VOCABULARY, fit, scalars, tags

from datamodules.sample import ensure_sample
from mmrec.commandline.run_folder import RunFolder, default_root
from mmrec.model import MMRecModel

TAGS = {
    "train/loss",
    "train/loss_main",
    "train/loss_aux",
    "aux/layer_00/loss",
    "train/grad_norm",
    "train/lr",
    "train/tokens",
    "val/loss",
    "val/ppl",
}


def test_the_folder_is_named_by_the_configs() -> None:
    assert default_root(["cpu_tiny"]) == default_root(["elsewhere/cpu_tiny.yaml"]) == Path("runs/cpu_tiny")
    assert default_root(["cpu_tiny", "mine/more.yaml"]) == Path("runs/cpu_tiny+more")
    assert default_root([]) == Path("runs/default")


def test_a_run_writes_into_one_folder(finished_run: Path) -> None:
    assert {path.name for path in finished_run.iterdir()} == {"checkpoints", "tb", "config.yaml"}
    names = {path.name for path in (finished_run / "checkpoints").iterdir()}
    assert "last.ckpt" in names
    assert any(name.startswith("step=000005-loss=") for name in names)  # the end, though 5 is no multiple of checkpoint_every
    assert not [path for path in (finished_run / "tb").iterdir() if path.is_dir()]


def test_the_event_files_hold_the_tags_of_every_group(finished_run: Path) -> None:
    found = tags(finished_run)
    assert found >= TAGS
    assert {tag.split("/")[0] for tag in found} == {"train", "val", "aux", "memory", "latency", "throughput"}


def test_the_first_validation_is_before_the_first_step(finished_run: Path) -> None:
    losses = scalars(finished_run, "val/loss")
    assert min(losses) == 0
    assert losses[0] == pytest.approx(math.log(300), rel=0.05)
    assert set(scalars(finished_run, "train/loss")) == set(range(5))


def test_the_saved_config_is_the_whole_config_and_starts_the_same_run(finished_run: Path, cli, tmp_path: Path) -> None:
    saved = yaml.safe_load((finished_run / "config.yaml").read_text())
    assert saved["trainer"]["default_root_dir"] == str(finished_run)
    assert saved["ckpt_path"] is None
    assert saved["model"]["network"]["model_dim"] == 16
    printed = cli("fit", "--config", str(finished_run / "config.yaml"), "--print_config")
    assert yaml.safe_load(printed.out) == saved


def test_a_checkpoint_loads_without_running_code(finished_run: Path) -> None:
    checkpoint = torch.load(finished_run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["network"]["model_dim"] == 16
    assert "_instantiator" not in checkpoint["hyper_parameters"]


def test_last_starts_anew_where_there_is_no_checkpoint_and_resumes_where_there_is(tiny_config: Path, cli, tmp_path: Path) -> None:
    first = cli("fit", "--config", str(tiny_config), "--ckpt_path", "last")
    assert first.out.splitlines()[0] == "no checkpoint under runs/tiny/checkpoints, starting at step 0"
    assert "TensorBoard logs: runs/tiny/tb" in first.out
    assert "last checkpoint: runs/tiny/checkpoints/last.ckpt" in first.out
    config = yaml.safe_load(Path("runs/tiny/config.yaml").read_text())

    second = cli("fit", "--config", str(tiny_config), "--ckpt_path", "last", "--trainer.max_steps", "7", "--model.learning_rate", "0.5")
    resumed = [line for line in second.out.splitlines() if line.startswith("resumed from")]
    assert resumed == ["resumed from step 5: runs/tiny/checkpoints/last.ckpt"]
    losses = scalars(Path("runs/tiny"), "train/loss")
    assert set(losses) == set(range(7))
    assert set(scalars(Path("runs/tiny"), "val/loss")) == {0}  # not validated again
    # The command line decides, not the hyperparameters in the checkpoint; and config.yaml says so.
    assert scalars(Path("runs/tiny"), "train/lr")[6] > 0.3
    assert config["model"]["learning_rate"] == 0.01
    assert yaml.safe_load(Path("runs/tiny/config.yaml").read_text())["model"]["learning_rate"] == 0.5
    assert {path.name for path in Path("runs/tiny").iterdir()} == {"checkpoints", "tb", "config.yaml"}
    said = "no step was trained: runs/tiny/checkpoints/last.ckpt is at step 7; raise --trainer.max_steps to go on"
    assert said not in second.out
    assert said in cli("fit", "--config", str(tiny_config), "--ckpt_path", "last", "--trainer.max_steps", "7").out


def test_a_saved_config_evaluates_what_was_trained(finished_run: Path, tiny_config: Path, cli) -> None:
    """Its `ckpt_path: null` does not mean random weights."""
    folder = str(finished_run)
    lines = []
    for config in (str(finished_run / "config.yaml"), str(tiny_config)):
        result = cli("test", "--config", config, "--trainer.default_root_dir", folder)
        assert f"reading {finished_run / 'checkpoints' / 'last.ckpt'}" in result.out + result.err
        lines.append(next(line for line in result.out.splitlines() if "test/loss" in line))
    assert lines[0] == lines[1]


def test_validate_test_and_predict_take_the_last_checkpoint_and_write_no_logs(finished_run: Path, tiny_config: Path, cli) -> None:
    run = Path("copy")
    shutil.copytree(finished_run, run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    results = {}
    for command in ("validate", "test", "predict"):
        results[command] = cli(command, "--config", str(tiny_config), "--trainer.default_root_dir", str(run))
        assert results[command].code == 0
    assert "val/loss" in results["validate"].out
    assert "test/loss" in results["test"].out
    predictions = run / "predictions.jsonl"
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert len(rows) == 2  # validation_batches × batch_size
    assert all(0 < row["loss"] < 10 and row["num_tokens"] == 16 for row in rows)
    predictions.unlink()
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_what_only_reads_needs_no_rights_to_write(
    finished_run: Path, sample_cache: Path, tiny_config: Path, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on a read-only mount; the built-in text lies there already."""
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
    Path("none").mkdir()
    mounted, access = {finished_run, sample_cache, Path("none")}, os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and not (mode & os.W_OK and Path(path) in mounted))
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_RDONLY))
    options = ("--config", str(tiny_config), "--trainer.default_root_dir", str(finished_run))
    assert cli("validate", *options).code == 0
    fault = "cannot be written: read-only file system; choose another folder"
    missing = cli("validate", *options, "--data.cache_dir", "none").err.splitlines()[-1]
    assert missing == f"error: the built-in text's folder (data.cache_dir) none {fault}"
    predicted = cli("predict", *options)  # before any of the work
    assert predicted.error == f"trainer.default_root_dir {finished_run} {fault}"
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")} == before


def test_a_checkpoint_of_another_shape_is_refused_before_anything_is_written(finished_run: Path, tiny_config: Path, cli) -> None:
    path = str(finished_run / "checkpoints" / "last.ckpt")
    error = cli("fit", "--config", str(tiny_config), "--ckpt_path", path, "--model.network.model_dim", "32").error
    assert "the checkpoint is of another network: network." in error
    assert "model.network.model_dim=16" in error
    assert not Path("runs").exists()


@pytest.mark.parametrize("damage", ["truncated", "text", "code", "flipped"])
def test_a_damaged_or_foreign_checkpoint_is_one_line(damage: str, finished_run: Path, tiny_config: Path, cli) -> None:
    whole = (finished_run / "checkpoints" / "last.ckpt").read_bytes()
    middle = len(whole) // 2
    if damage == "code":
        torch.save({"state_dict": {}, "model": MMRecModel(vocab_size=8, model_dim=8, num_layers=1)}, "bad.ckpt")
    else:
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        Path("bad.ckpt").write_bytes({"truncated": whole[:middle], "text": b"no checkpoint at all", "flipped": flipped}[damage])
    assert cli("fit", "--config", str(tiny_config), "--ckpt_path", "bad.ckpt").error.startswith("checkpoint bad.ckpt is ")
    assert not Path("runs").exists()


def test_our_callbacks_stay_whatever_the_list_says_and_each_can_be_left_out(tiny_config: Path, cli) -> None:
    Path("x.yaml").write_text("trainer:\n  callbacks:\n  - class_path: LearningRateMonitor\n")
    options = ["--disable_callbacks", "[step_latency]", "--trainer.max_steps", "2", "--trainer.default_root_dir", "run"]
    assert cli("fit", "--config", str(tiny_config), "--config", "x.yaml", *options).code == 0
    found = tags(Path("run"))
    assert {tag for tag in found if tag.startswith("lr-")}  # the user's
    assert {tag.split("/")[0] for tag in found} >= {"memory", "aux"}
    assert not {tag for tag in found if tag.startswith("latency/")}
    assert Path("run/checkpoints/last.ckpt").is_file()


def test_a_run_begun_anew_moves_the_earlier_one_aside(tiny_config: Path, cli) -> None:
    options = ["--trainer.max_steps", "1"]
    root, earlier = Path("runs/tiny"), Path("runs/tiny/earlier")
    assert "moved" not in cli("fit", "--config", str(tiny_config), *options).out
    first = (root / "checkpoints/last.ckpt").read_bytes()
    for number in ("001", "002"):
        again = cli("fit", "--config", str(tiny_config), *options).out
        assert f"moved the earlier run under {root} to {earlier / number} (--ckpt_path last would have gone on with it)\n" in again
    assert (earlier / "001/checkpoints/last.ckpt").read_bytes() == first
    assert sorted(path.name for path in (earlier / "002").iterdir()) == ["checkpoints", "config.yaml", "tb"]
    assert len(list((root / "tb").glob("events.*"))) == 1
    assert "moved" not in cli("fit", "--config", str(tiny_config), *options, "--ckpt_path", "last").out
    shutil.rmtree(root / "checkpoints")
    again = cli("fit", "--config", str(tiny_config), *options, "--ckpt_path", "last").out
    assert f"moved the earlier run under {root} to {earlier / '003'} (it has no last checkpoint)\n" in again


def test_a_start_that_fails_moves_nothing(finished_run: Path, tiny_config: Path, cli) -> None:
    shutil.copytree(finished_run, "run")
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    ended = cli("fit", "--config", str(tiny_config), "--trainer.default_root_dir", "run", "--data.seq_len", "10000000")
    assert ended.code == 2
    assert "moved" not in ended.out
    after = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before
    assert {path.parent for path in after.keys() - before.keys()} <= {Path("run/tb")}  # Lightning opens an event file before setup


def test_what_the_new_run_has_made_by_then_stays(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    for name in (
        "checkpoints/last.ckpt",
        "tb/events.1",
        "memory/request",
        "batches/step=000003-rank=0.jsonl",
        "config.yaml",
        "data/sample",
    ):
        (folder.root / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.root / name).write_text("old")
    files = folder.run_files()
    (folder.tensorboard / "events.2").write_text("new")
    (folder.checkpoints / "last.ckpt").unlink()
    aside = folder.set_aside(files)
    assert aside == folder.root / "earlier" / "001"
    assert {str(path.relative_to(aside)) for path in aside.rglob("*") if path.is_file()} == {
        "tb/events.1",
        "memory/request",
        "batches/step=000003-rank=0.jsonl",
        "config.yaml",
    }
    assert [path.name for path in folder.tensorboard.iterdir()] == ["events.2"]
    assert (folder.root / "data" / "sample").is_file()


def test_bad_lines_met_in_training_end_in_one_line(tiny_config: Path, sample_cache: Path, cli) -> None:
    good = json.dumps({"text": "word " * 10}) + "\n"
    Path("text.jsonl").write_text(good * 1200 + "no json\n" * 100 + good * 2)  # behind what is looked at before anything is built
    tokenizer = ensure_sample(sample_cache, VOCABULARY) / "tokenizer.json"
    arguments = {"source": "local", "tokenizer": str(tokenizer), "train_files": "text.jsonl", "validation_files": "good.jsonl"}
    Path("good.jsonl").write_text(good * 5)
    Path("x.yaml").write_text(yaml.safe_dump({"data": {"init_args": {**arguments, "cache_dir": None, "max_bad_line_share": 0.05}}}))
    ended = cli("fit", "--config", str(tiny_config), "--config", "x.yaml", "--trainer.max_steps", "2000")
    assert ended.code == 2
    lines = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "text.jsonl:1201" in lines[0]
    assert "Traceback" not in ended.err


def test_a_moved_run_goes_on(finished_run: Path, tiny_config: Path, cli) -> None:
    shutil.copytree(finished_run, "moved")
    fit(tiny_config, "--trainer.default_root_dir", "moved", "--ckpt_path", "last", "--trainer.max_steps", "6")
    assert set(scalars(Path("moved"), "train/loss")) == set(range(6))


def test_lightning_s_own_callbacks_can_be_named(tiny_config: Path, cli) -> None:
    """Timer has an enumeration for a default, which has to come through YAML and back."""
    Path("x.yaml").write_text("trainer:\n  callbacks:\n  - class_path: Timer\n    init_args: {duration: '00:00:10:00'}\n")
    assert cli("fit", "--config", str(tiny_config), "--config", "x.yaml", "--trainer.max_steps", "1").code == 0
    saved = yaml.safe_load(Path("runs/tiny+x/config.yaml").read_text())
    assert saved["trainer"]["callbacks"][0]["init_args"]["interval"] == "step"


def test_a_run_warns_of_nothing(tiny_config: Path, recwarn: pytest.WarningsRecorder) -> None:
    """What libraries say about themselves would hide what a user can mend."""
    fit(tiny_config)
    assert [str(warning.message) for warning in recwarn] == []
