"""Files that are there wholly or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def sync_folder(folder: str | Path) -> None:
    """Make renames in a folder survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write beside the target, flush to disk, rename: a reader never sees half a file, and of two writers the last wins whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def require_writable(folder: str | Path, what: str) -> None:
    """Raise a one-line error unless `folder`, or the nearest parent that exists, can be written.

    Raises:
        NotADirectoryError: a file stands in the way.
        PermissionError: no right to write there.
    """
    place = Path(folder)
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"{what} {folder} cannot be written: {place} is a file; choose another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"{what} {folder} cannot be written: no permission in {place}; choose another folder")
