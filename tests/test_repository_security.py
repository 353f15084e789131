"""What must not stand anywhere in the repository's code, configs or commands."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("mmrec", "lightning_modules", "datamodules", "callbacks", "configs", "benchmarks", "docs")
FILES = ("README.md", "Makefile", "pyproject.toml")
SUFFIXES = (".py", ".yaml", ".md", ".sbatch", ".toml", "")


def texts() -> dict[str, str]:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix in SUFFIXES]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in [*paths, *(ROOT / name for name in FILES)]}


def test_no_code_of_a_data_set_or_model_is_trusted() -> None:
    assert [name for name, text in texts().items() if "trust_remote_code" in text] == []


def test_tensorboard_is_shown_to_this_machine_alone() -> None:
    """Its default is the loopback; options that would change that are nowhere."""
    found = texts()
    lines = [(name, line) for name, text in found.items() for line in text.splitlines() if "tensorboard --logdir" in line]
    assert ("README.md", "tensorboard --logdir runs/cpu_tiny/tb") in lines
    assert [line for line in lines if "--host" in line[1]] == []
    assert [name for name, text in found.items() if "--bind_all" in text or "bind_all=" in text] == []
