"""Nothing that a command makes can be written by other users, even where the user's umask lets them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_support import fit
from processes import run_python

from mmrec.cli import main


@pytest.fixture
def no_umask() -> Iterator[None]:
    """A umask that takes no right away."""
    before = os.umask(0)
    yield
    os.umask(before)


def writable_by_all(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if not path.is_symlink() and path.stat().st_mode & 0o002]


def test_run_folder_and_export_are_not_world_writable(no_umask: None, tiny_config: Path, tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    probe.touch()
    assert probe.stat().st_mode & 0o002  # or the test could not fail
    probe.unlink()
    # A learning rate with which every step but the first is not finite: batches/ is made, and the run ended.
    options = ["--model.learning_rate", "1e30", "--trainer.max_steps", "9", "--skipped_steps.max_in_row", "2"]
    with pytest.raises(SystemExit):
        fit(tiny_config, "--trainer.default_root_dir", "broken", *options)
    again = ["--trainer.default_root_dir", "run", "--data.cache_dir", "sample", "--trainer.val_check_interval", "2"]
    fit(tiny_config, *again)
    fit(tiny_config, *again)  # the earlier one is moved aside
    main(["validate", "--config", "run/config.yaml"])
    main(["predict", "--config", "run/config.yaml"])
    main(["export", "--run", "run", "--output", "model"])
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    wanted = {"run", "run/checkpoints", "run/checkpoints/last.ckpt", "run/checkpoints/best.ckpt", "run/tb", "run/config.yaml"}
    assert wanted | {"run/earlier", "run/predictions.jsonl", "model/model.safetensors", "model/config.json", "broken/batches"} <= made
    assert writable_by_all(tmp_path) == []


def test_processes_that_fit_starts_inherit_it(tiny_config: Path, tmp_path: Path) -> None:
    """Two ranks and data workers; the umask is the shell's."""
    command = ["-m", "mmrec.cli", "fit", "--config", tiny_config, "--trainer.default_root_dir", "run"]
    command += ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.num_workers", "1", "--trainer.max_steps", "2"]
    run_python(*command, seconds=200, umask=0)
    assert (tmp_path / "run/checkpoints/last.ckpt").is_file()
    assert writable_by_all(tmp_path) == []
