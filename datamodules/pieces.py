"""Whole texts again from pieces: documents whose `url` is `NAME#NUMBER`, joined in the order of their numbers.

A corpus is often cut into pieces and shuffled, so that a window of training holds pieces of several books. Joined, it holds one book.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datamodules.documents import LineCounts, parse_record, read_lines
from datamodules.tokenise import Split
from mmrec.files import replacing

_logger = logging.getLogger(__name__)
_PIECE = re.compile(r"(?P<name>.*)#(?P<number>\d{1,18})", re.DOTALL)  # some names hold line ends, some a `#` of their own
BETWEEN = "\n\n"  # pieces were cut at the ends of paragraphs
Record = dict[str, Any]


def joined_records(files: Sequence[str], max_bad_line_share: float, side: Split | None = None) -> Iterator[Record]:
    """Records `{"text", "timestamp", "url"}` of whole texts, in the order in which the first piece of each appears in the files.

    Where a number is missing the text is cut: what stands on the two sides of a gap was never adjacent. A record whose `url` names no
    piece, or one that was there already, stays as it is. Everything is read before the first record comes, and kept in memory.

    Args:
        files: JSON-lines files (plain, .gz, .xz).
        max_bad_line_share: share of lines that may be skipped.
        side: which records to join; the others are missing from their texts. None: all.

    Raises:
        ValueError: too many bad lines, or a damaged file.
    """
    side = side or Split()
    texts: dict[Any, dict[int, Record]] = {}
    counts = LineCounts()
    for path in files:
        for line_number, line in enumerate(read_lines(path), start=1):
            record, reason = parse_record(line)
            counts.add(reason, f"{path}:{line_number}")
            if record is None:
                counts.require_share(max_bad_line_share, final=False)
                continue
            if not side.holds(record["text"]):
                continue
            name, number = piece_of(record)
            if name is None or number in texts.get(name, {}):
                name, number = (path, line_number), 0  # a key that no piece has
            texts.setdefault(name, {})[number] = record
    counts.require_share(max_bad_line_share, final=True)
    if counts.skipped:
        _logger.warning("%s", counts.summary())
    for name, pieces in texts.items():
        if isinstance(name, tuple):
            yield pieces[0]
            continue
        for run in _without_gaps(sorted(pieces)):
            first = pieces[run[0]]
            yield {"text": BETWEEN.join(pieces[number]["text"] for number in run), "timestamp": first.get("timestamp", ""), "url": name}


def write_joined(files: Sequence[str], target: Path, max_bad_line_share: float, side: Split | None = None) -> None:
    """Write `joined_records` as JSON lines, the whole file or nothing."""
    with replacing(target) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for record in joined_records(files, max_bad_line_share, side):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def piece_of(record: Record) -> tuple[str | None, int]:
    """Name and number of the text that a record is a piece of; None where it is none."""
    url = record.get("url")
    match = _PIECE.fullmatch(url) if isinstance(url, str) else None
    return (match["name"], int(match["number"])) if match else (None, 0)


def _without_gaps(numbers: list[int]) -> Iterator[list[int]]:
    """Ascending numbers, cut where one is missing."""
    run: list[int] = []
    for number in numbers:
        if run and number != run[-1] + 1:
            yield run
            run = []
        run.append(number)
    yield run
