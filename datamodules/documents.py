"""Documents from C4's JSON lines: `{"text", "timestamp", "url"}`, one object a line, plain or compressed.

Lines are split and decoded here, byte for byte, because one bad line must cost one line. The `json` builder of HF `datasets` drops a
whole file at its first bad line; its `text` builder ignores `encoding` and `encoding_errors` on compressed files (seen in datasets 5.2:
`xopen` does not hand them on), so that one bad byte raises UnicodeDecodeError and loses the rest of the shard.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fsspec.compression import compr
from fsspec.utils import infer_compression

_REASONS = {"not_json": "no JSON object", "no_text": 'without a "text" string', "not_utf8": "no UTF-8", "empty": "empty"}
_FEW = 1000


@dataclass
class LineCounts:
    """How many lines were read, and how many skipped for which reason; `first_bad` is `file:line` of the first skipped one."""

    lines: int = 0
    not_json: int = 0
    no_text: int = 0
    not_utf8: int = 0
    empty: int = 0
    first_bad: str | None = None

    @property
    def skipped(self) -> int:
        return self.not_json + self.no_text + self.not_utf8 + self.empty

    def add(self, reason: str | None, place: str) -> None:
        """Count a line; `reason` is None for a good one, else the name of the field to count it under."""
        self.lines += 1
        if reason is not None:
            setattr(self, reason, getattr(self, reason) + 1)
            self.first_bad = self.first_bad or place

    def as_dict(self) -> dict[str, int | str | None]:
        return asdict(self)

    def summary(self) -> str:
        """For instance `skipped 3 of 1,000 lines (0.30 %: 2 no JSON object, 1 empty), the first at part.jsonl:17`."""
        parts = ", ".join(f"{getattr(self, name):,} {text}" for name, text in _REASONS.items() if getattr(self, name))
        share = 100 * self.skipped / max(1, self.lines)
        return f"skipped {self.skipped:,} of {self.lines:,} lines ({share:.2f} %: {parts}), the first at {self.first_bad}"

    def require_share(self, max_bad_line_share: float, *, final: bool) -> None:
        """Raise a ValueError past the share of bad lines. Before the end of the data (`final=False`) only once 1,000 lines were read."""
        if (final or self.lines >= _FEW) and self.skipped > max_bad_line_share * self.lines:
            raise ValueError(
                f"too many bad lines: {self.summary()}; at most {100 * max_bad_line_share:g} % are allowed: "
                "mend the file or raise data.max_bad_line_share"
            )


def parse_line(line: bytes) -> tuple[str | None, str | None]:
    """The text of one JSON line and None, or None and the reason why it is skipped."""
    record, reason = parse_record(line)
    return (None if record is None else record["text"]), reason


def parse_record(line: bytes) -> tuple[dict[str, Any] | None, str | None]:
    """The whole object of one JSON line, whose "text" is good, and None; or None and the reason why it is skipped."""
    if not line.strip():
        return None, "empty"
    try:
        record = json.loads(line.decode("utf-8").lstrip("\ufeff"))
    except UnicodeDecodeError:
        return None, "not_utf8"
    except (ValueError, RecursionError):
        return None, "not_json"
    if not isinstance(record, dict):
        return None, "not_json"
    text = record.get("text")
    if not isinstance(text, str):
        return None, "no_text"
    if not text.strip():
        return None, "empty"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # an escaped lone surrogate: valid JSON, but no text that UTF-8 can hold
        return None, "not_utf8"
    return record, None


def read_lines(path: str, skip: int = 0, on_position: Callable[[int], None] | None = None) -> Iterator[bytes]:
    """Yield the lines of a file (plain, .gz, .xz, .bz2) without their newline, from line `skip` on (0-based).

    Args:
        on_position: called now and then with the number of bytes of the file read so far (compressed bytes where it is compressed).

    Raises:
        ValueError: the compressed data is damaged.
    """
    compression, number = infer_compression(path), 0
    with open(path, "rb") as raw:
        file = compr[compression](raw, mode="rb") if compression else raw
        try:
            for line in file:
                if on_position is not None and number % 64 == 0:
                    on_position(raw.tell())
                number += 1
                if number > skip:
                    yield line.rstrip(b"\r\n")
        except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is damaged after line {number}: {error}; fetch the file again") from error


def is_validation(text: str, fraction: float) -> bool:
    """Whether a document belongs to the validation split: by a hash of its text, so that copies of a document fall on the same side."""
    if fraction <= 0.0:
        return False
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def resolve_files(patterns: str | Sequence[str], name: str) -> list[str]:
    """Files that globs stand for, sorted within each glob, without repetition, as given (not made absolute).

    Raises:
        FileNotFoundError: a glob matches nothing.
        PermissionError: a file cannot be read.
        ValueError: no glob at all, or all files of a glob are empty.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise ValueError(f"{name} is empty: give at least one path or glob of JSON-lines files")
    files: dict[str, None] = {}
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        # A file whose name holds brackets is taken as it is called.
        matches = (
            [expanded] if Path(expanded).is_file() else sorted(path for path in glob.glob(expanded, recursive=True) if Path(path).is_file())
        )
        if not matches:
            raise FileNotFoundError(f"{name}: no file matches {pattern!r} (seen from {os.getcwd()}); correct the path or glob")
        if all(os.path.getsize(path) == 0 for path in matches):
            raise ValueError(f"{name}: every file that matches {pattern!r} is empty; give files with JSON lines")
        for path in matches:
            if not os.access(path, os.R_OK):
                raise PermissionError(f"{name}: no permission to read {path}; change its mode or leave it out of the glob")
            files.setdefault(path)
    return list(files)


def probe_files(files: Sequence[str], name: str, max_bad_line_share: float, *, most_files: int = 8, most_lines: int = _FEW) -> None:
    """Look at the first lines of some files, spread over the list, before anything is built.

    They are judged by their share of bad lines as a run would judge them, which would fail at the same place only later; a file with no
    good line among them fails whatever the others hold.

    Raises:
        ValueError: see above, or damaged compression.
    """
    step = max(1, len(files) // most_files)
    total, everything_seen = LineCounts(), step == 1
    for path in files[::step]:
        counts, ended = LineCounts(), True
        for number, line in enumerate(read_lines(path), start=1):
            if number > most_lines:
                ended = False
                break
            reason = parse_line(line)[1]
            counts.add(reason, f"{path}:{number}")
            total.add(reason, f"{path}:{number}")
        if counts.lines and counts.skipped == counts.lines and max_bad_line_share < 1.0:
            raise ValueError(
                f"{name}: none of the first {counts.lines} lines of {path} is a document ({counts.summary()}); "
                'give files with one {"text": ...} object a line'
            )
        everything_seen = everything_seen and ended
    total.require_share(max_bad_line_share, final=everything_seen)
