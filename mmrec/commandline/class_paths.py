"""Which packages a config may name classes of.

A class path in a config is code to be imported: with jsonargparse's own defaults, naming a callback `evilmod.X` runs the
module `evilmod`, even under `--print_config`. Here everything is denied but the packages below.
"""

import sys
from typing import Any

from jsonargparse import set_parsing_settings

# Bare import paths. They allow everything below them, so no package belongs here that holds a way to run what a value says.
ALLOWED_PACKAGES = (
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "lightning.pytorch.accelerators",
    "lightning.fabric.plugins",
    "lightning_modules",
    "datamodules",
    "callbacks",
)


def restrict_class_paths() -> None:
    """Deny class paths outside `ALLOWED_PACKAGES`, and configs from URLs, for every parser of this process.

    Call it after `lightning.pytorch.cli` was imported, which switches fsspec paths on.
    """
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=list(ALLOWED_PACKAGES),
        config_read_mode_urls_enabled=False,
        config_read_mode_fsspec_enabled=False,
    )


def is_allowed(class_path: str) -> bool:
    """Whether a config may name this class."""
    return any(class_path.startswith(f"{package}.") for package in ALLOWED_PACKAGES)


def imported_class(class_path: str) -> Any | None:
    """The class of that path if its module has been imported already, else None; imports nothing."""
    module, _, name = class_path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def subclass_names(base: type) -> list[str]:
    """Names of all subclasses of `base` that have been imported."""
    names: set[str] = set()
    pending: list[type] = base.__subclasses__()
    while pending:
        cls = pending.pop()
        names.add(cls.__name__)
        pending.extend(cls.__subclasses__())
    return sorted(names)
