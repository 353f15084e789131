"""Finding config files, by path or by the name of a shipped one, and reading what they inherit from.

A config may name one or several others under its top-level key `base`; these are merged first, in the order given, and
the file itself last. The key is ours, not jsonargparse's: it is resolved here, before the parser sees anything, so that
a config can be a small overlay of another. Names under `base` are looked for beside the file, then as given, then among
the shipped ones.
"""

from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mmrec.nearest import did_you_mean, nearest_name

SUFFIXES = (".yaml", ".yml")


class ConfigLayer(NamedTuple):
    """One file's own content, `base` taken out: what it says on top of the files before it."""

    path: Path
    content: dict[str, Any]


def shipped_config_folder() -> Path:
    """Folder of the configs that come with the package.

    An installed copy holds them as package data in `mmrec/configs`; a checkout has them in `configs/` at its root.

    Raises:
        FileNotFoundError: if neither folder exists (a broken installation).
    """
    package = Path(str(resources.files("mmrec")))
    candidates = (package / "configs", package.parent / "configs")
    for folder in candidates:
        if any(folder.glob("*.yaml")):
            return folder
    raise FileNotFoundError(f"no shipped configs in {candidates[0]} or {candidates[1]}: the installation is incomplete")


def shipped_configs() -> dict[str, Path]:
    """Shipped configs by name (file name without suffix), sorted."""
    return {path.stem: path for path in sorted(shipped_config_folder().glob("*.yaml"))}


def find_config(name: str, beside: Path | None = None) -> Path:
    """Path of the config called `name`: as given (or beside another file), then among the shipped ones.

    Raises:
        FileNotFoundError: naming the nearest and all shipped configs.
        IsADirectoryError: where the path is a folder.
    """
    given = Path(name).expanduser()
    for candidate in [beside / given, given] if beside else [given]:
        if candidate.is_file():
            return candidate
    shipped = shipped_configs()
    stem = given.stem if given.suffix in SUFFIXES else given.name
    if given.name == name and stem in shipped:
        return shipped[stem]
    overlay = shipped_config_folder() / given.with_suffix(SUFFIXES[0])  # ablation/NAME, baselines/NAME
    if not given.is_absolute() and ".." not in given.parts and overlay.is_file():
        return overlay
    if given.is_dir():
        raise IsADirectoryError(f"config {name} is a folder; give a YAML file in it, or the name of a shipped config")
    folder = shipped_config_folder()
    others = [str(path.relative_to(folder).with_suffix("")) for path in sorted(folder.glob(f"*/*{SUFFIXES[0]}"))]
    folders = dict.fromkeys(f"{Path(other).parent}/" for other in others)
    wanted = str(given.with_suffix("")) if given.name != name else stem
    hint = did_you_mean(nearest_name(wanted, [*shipped, *others], cutoff=0.6)) or "."
    raise FileNotFoundError(f"no config {name}{hint} Shipped ones: {', '.join(shipped)}; more in {', '.join(folders)}")


def read_config(path: Path) -> dict[str, Any]:
    """Content of one YAML file; an empty one says nothing.

    Raises:
        ValueError: for text that is no UTF-8, no YAML, not a mapping, or gives one key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}; save it as UTF-8") from error
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise OSError(f"config {path} cannot be read: {reason}; give a file that can be") from error
    try:
        duplicate = next(_duplicate_keys(yaml.compose(text, Loader=yaml.SafeLoader)), None)
        content = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(
            f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {error.problem or error.context}; correct it there"
        ) from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}; correct it") from error
    if duplicate:
        raise ValueError(f"{path}:{duplicate[1]}: key {duplicate[0]} is given twice; take one out")
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path}: expected a mapping of keys to values at the top, as in `trainer: {{max_steps: 10}}`")
    return content


def _duplicate_keys(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Dotted names and line numbers of keys given twice in one mapping, which YAML loaders pass over silently."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            if name in seen:
                yield name, key.start_mark.line + 1
            seen.add(name)
            yield from _duplicate_keys(value, f"{name}.")
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _duplicate_keys(value, f"{prefix}{index}.")


def config_layers(name: str, beside: Path | None = None, _above: tuple[Path, ...] = ()) -> list[ConfigLayer]:
    """The files that make up config `name`, its bases first, each without its `base` key.

    Raises:
        ValueError: for a `base` that is no name or list of names, or that leads back to itself.
    """
    path = find_config(name, beside)
    if path.resolve() in _above:
        raise ValueError(f"{_above[-1]}: base {name} leads back to itself; take it out")
    content = read_config(path)
    bases = content.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"{path}: base must be the name of a config or a list of such names")
    layers = [layer for base in bases for layer in config_layers(base, path.parent, (*_above, path.resolve()))]
    return [*layers, ConfigLayer(path, content)]


def merge(layers: list[ConfigLayer]) -> dict[str, Any]:
    """One mapping of all layers, later ones winning key by key; for reading, the parser merges by its own rules.

    Where a layer names another class, the `init_args` of the one before are dropped. The parser keeps those of them that the new class
    takes too; which these are only an import of it would tell, and that takes seconds.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        _merge_into(merged, layer.content)
    return merged


def _merge_into(target: dict[str, Any], source: dict[str, Any]) -> None:
    if "class_path" in target and "class_path" in source and _class_name(target) != _class_name(source):
        target.pop("init_args", None)
    for key, value in source.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge_into(target[key], value)
        else:
            target[key] = value


def _class_name(spec: dict[str, Any]) -> str:
    """Without the module, which the parser lets be left out."""
    return str(spec["class_path"]).rpartition(".")[2]
