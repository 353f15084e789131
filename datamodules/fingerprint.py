"""Fingerprints: does a resumed run still read the corpus that it was trained on?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_BLOCK = 64 * 1024
_WHOLE = 16 * 1024 * 1024
_SAMPLES = 62
_COMPRESSED = {".gz", ".xz", ".bz2", ".zst"}


def fingerprint_of(value: Any) -> str:
    """SHA-256 (hex) of a JSON-able value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def sha256_of(path: str | Path) -> str:
    """SHA-256 (hex) of a whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_fingerprint(path: str | Path) -> dict[str, Any]:
    """Name, size and a digest of a file: of all its bytes up to 16 MiB, else of 64 blocks of 64 KiB spread over it.

    The end of a compressed file holds a check sum, so that any edit shows. In a large plain file an edit between the blocks that keeps the
    length would not: there the time of change counts too.
    """
    path = Path(path)
    status = path.stat()
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if status.st_size <= _WHOLE:
            digest.update(file.read())
        else:
            step = (status.st_size - _BLOCK) // (_SAMPLES + 1)
            for block in range(_SAMPLES + 1):
                file.seek(block * step)
                digest.update(file.read(_BLOCK))
            file.seek(status.st_size - _BLOCK)
            digest.update(file.read(_BLOCK))
            if path.suffix not in _COMPRESSED:
                digest.update(str(status.st_mtime_ns).encode())
    return {"name": path.name, "size": status.st_size, "sha256": digest.hexdigest()}


def corpus_fingerprint(paths: Iterable[str | Path]) -> str:
    """Fingerprint of a list of files in its order. The folder they lie in does not count, so that a corpus may be moved."""
    return fingerprint_of([file_fingerprint(path) for path in paths])
