"""A config that would run code is refused by every command that reads one, and its code does not run."""

import json
import sys
from pathlib import Path

import pytest

# Each is laid over cpu_tiny. evilmod, on Python's path, makes a file named `canary` when it is imported.
WAYS = {
    "a callback of another package": "trainer: {callbacks: [{class_path: evilmod.X}]}",
    "a callback appended": "trainer: {callbacks+: [{class_path: evilmod.X}]}",
    "a logger": "trainer: {logger: {class_path: evilmod.X}}",
    "a data module": "data: {class_path: evilmod.X}",
    "a strategy": "trainer: {strategy: {class_path: evilmod.X}}",
    "a strategy by name": "trainer: {strategy: evilmod.X}",
    "a plugin": "trainer: {plugins: [{class_path: evilmod.X}]}",
    "a profiler": "trainer: {profiler: {class_path: evilmod.X}}",
    "an accelerator": "trainer: {accelerator: {class_path: evilmod.X}}",
    "a name reached through an allowed module": (
        "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.model_checkpoint.os.system, init_args: {command: touch canary}}]}"
    ),
    "a strategy reached through an allowed module": "trainer: {strategy: lightning.pytorch.strategies.ddp.os.system}",
    "a callable argument": (
        "trainer: {callbacks: [{class_path: LambdaCallback, init_args: {on_fit_start: evilmod.run, setup: evilmod.run}}]}"
    ),
    "a class within a class": (
        "trainer: {strategy: {class_path: lightning.pytorch.strategies.DDPStrategy, init_args: {ddp_comm_hook: evilmod.run}}}"
    ),
    "a tag that calls": "trainer: !!python/object/apply:os.system ['touch canary']",
    "a tag that makes an object": "trainer: !!python/object:evilmod.X {}",
    "a tag that imports": "trainer: !!python/module:evilmod",
    "a tag that names": "trainer: !!python/name:evilmod.X",
    "a tag below": "data: {init_args: {seq_len: !!python/object/new:evilmod.X []}}",
    "a data module that another file gives": "data: evil_data.yaml",
}
EVIL = """
import pathlib
pathlib.Path("canary").touch()
def run(*arguments, **more):
    pathlib.Path("canary").touch()
class X:
    pass
"""
COMMANDS = {
    "fit": ["fit", "--config", "cpu_tiny", "--config", "x.yaml"],
    "print_config": ["fit", "--config", "cpu_tiny", "--config", "x.yaml", "--print_config"],
    "base": ["fit", "--config", "above.yaml"],
    "validate": ["validate", "--config", "cpu_tiny", "--config", "x.yaml"],
    "configs": ["configs", "above.yaml"],
    "doctor": ["doctor", "--config", "above.yaml", "--json"],
}
ONLY_READ = ("configs", "doctor")  # they look at sizes and make no object of anything
PLAIN_TEXT = "trainer: {strategy: "  # a name, which --print_config prints


@pytest.fixture(autouse=True)
def _evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evilmod.py").write_text(EVIL)
    (tmp_path / "evil_data.yaml").write_text("class_path: evilmod.X\n")
    (tmp_path / "above.yaml").write_text("base: [cpu_tiny, x.yaml]\n")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("way", WAYS)
def test_the_canary_is_never_written(way: str, cli) -> None:
    Path("x.yaml").write_text(WAYS[way] + "\n")
    for name, arguments in COMMANDS.items():
        if name == "doctor" and "tag" not in way:
            continue  # reads as configs does, and takes a second
        result = cli(*arguments)
        assert not Path("canary").exists(), name
        assert "evilmod" not in sys.modules, name
        if name not in ONLY_READ and not (name == "print_config" and WAYS[way].startswith(PLAIN_TEXT)):
            assert result.error
        assert not Path("runs").exists()


@pytest.mark.parametrize(
    "name", ["memory://evil.yaml", "file:///etc/hostname", "https://localhost/evil.yaml", "github://a:b@main/evil.yaml"]
)
@pytest.mark.parametrize("option", ["--config", "--trainer", "--data"])
def test_no_config_is_fetched_from_anywhere(option: str, name: str, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*arguments: object, **more: object) -> None:
        raise AssertionError("fsspec was asked for a file")

    monkeypatch.setattr("fsspec.open", opened)
    monkeypatch.setattr("fsspec.core.url_to_fs", opened)
    assert cli("fit", "--config", "cpu_tiny", option, name).error
    assert not list(tmp_path.glob("runs"))


def test_an_allowed_class_of_ours_takes_no_callable() -> None:
    """What is to be run cannot be an argument: no class that a config may name and that is ours has one."""
    import callbacks
    import datamodules
    from lightning_modules import strategies

    found = []
    for module in (callbacks, datamodules, strategies):
        for name in {*vars(module), *getattr(module, "__all__", ())}:
            value = getattr(module, name)
            if isinstance(value, type) and value.__module__.startswith(("callbacks", "datamodules", "lightning_modules")):
                hints = getattr(value.__init__, "__annotations__", {})
                found += [(name, key, str(hint)) for key, hint in hints.items() if "Callable" in str(hint) or "type[" in str(hint).lower()]
    assert json.dumps(found) == "[]"
