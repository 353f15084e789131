"""A run of a few steps, made once, and a way to call the command line within the test's process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from cli_support import VOCABULARY, CommandLine, fit


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """`cli("fit", "--config", ...)`; anything but bad input raises as it would on a terminal."""
    return CommandLine(capsys)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Relative paths, `runs/` among them, lie in the test's own folder; one thread, as in the processes that tests start."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def sample_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the built-in sample of these tests lies: trained once a process."""
    return tmp_path_factory.mktemp("sample")


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory, sample_cache: Path) -> Path:
    """A config that trains in a second."""
    content = {
        "seed_everything": 1,
        "checkpoint_every": 2,
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 5, "log_every_n_steps": 1, "enable_model_summary": False},
        "model": {
            "learning_rate": 0.01,
            "warmup_steps": 1,
            "decay_steps": 100,
            "network": {"vocab_size": VOCABULARY, "model_dim": 16, "num_layers": 1, "num_heads": 2},
        },
        "data": {
            "class_path": "datamodules.C4DataModule",
            "init_args": {
                "source": "sample",
                "vocab_size": VOCABULARY,
                "seq_len": 16,
                "batch_size": 2,
                "validation_batches": 1,
                "cache_dir": str(sample_cache),
            },
        },
        "auxiliary_curves": {"diagnostics_every_n_steps": 2, "gradients_every_n_steps": 2},
    }
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path) -> Path:
    """The folder of a finished `fit` of five steps; not to be written to."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    fit(tiny_config, "--trainer.default_root_dir", str(folder))
    return folder
