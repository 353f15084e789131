"""What ranks that train together must have in common, as short texts by name."""

import hashlib
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mmrec.commandline.errors import OUR_PACKAGES

_PACKAGES = ("mmrec", "torch", "triton", "lightning", "torchao", "tokenizers", "datasets")
_ROOT = Path(__file__).parents[2]


def run_facts(config: Mapping[str, Any]) -> dict[str, str]:
    """Every value of a resolved config by its dotted key, versions, git commit, and hashes of the packages' source and kernel tables."""
    facts = {f"config.{key}": repr(value) for key, value in _values(config)}
    facts |= {f"the version of {name}": _version(name) for name in _PACKAGES}
    facts["the git commit"] = _commit()
    facts["the packages' source"] = files_digest(_ROOT, (path for package in OUR_PACKAGES for path in (_ROOT / package).rglob("*.py")))
    facts["the kernels' tables of tiles"] = files_digest(_ROOT, (_ROOT / "mmrec").rglob("*.json"))
    return facts


def _values(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _values(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _commit() -> str:
    """Of the checkout that the packages lie in, `none` where that is none or git is missing."""
    if not (_ROOT / ".git").exists():  # not a repository that happens to lie around an installed package
        return "none"
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=_ROOT, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return done.stdout.strip() or "none"


def files_digest(root: Path, paths: Iterable[Path]) -> str:
    """SHA-256 (hex) of files' places under `root` and their bytes, whatever the order they are given in."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()
