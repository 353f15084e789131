"""Whole texts again from pieces: documents whose `url` is `NAME#NUMBER`, joined in the order of their numbers.

A corpus is often cut into pieces and shuffled, so that a window of training holds pieces of several books. Joined, it holds one book.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.documents import LineCounts, parse_record, read_lines
from datamodules.tokenise import Split
from mmrec.files import replacing

_logger = logging.getLogger(__name__)
_PIECE = re.compile(r"(?P<name>.*)#(?P<number>\d{1,18})", re.DOTALL)  # some names hold line ends, some a `#` of their own
BETWEEN = "\n\n"  # pieces were cut at the ends of paragraphs
Record = dict[str, Any]


@dataclass
class Joining:
    """What became of the documents that were to be joined.

    Attributes:
        pieces: those that became part of a text, alone or with others.
        texts: of several pieces, with no number missing between the first and the last.
        stretches: of several pieces, of texts that are cut where a number is missing.
        alone: pieces with no neighbour.
        others: documents that name no piece, or one that was there already.
    """

    pieces: int = 0
    texts: int = 0
    stretches: int = 0
    alone: int = 0
    others: int = 0

    def add(self, runs: Sequence[Sequence[int]]) -> None:
        """Count a text's pieces, by the stretches that it came in."""
        several = sum(len(run) > 1 for run in runs)
        self.pieces += sum(map(len, runs))
        self.alone += len(runs) - several
        if len(runs) == 1:
            self.texts += several
        else:
            self.stretches += several

    def summary(self) -> str:
        """All of it in a line."""
        return (
            f"{self.pieces:,} pieces became {self.texts:,} whole texts and, where a piece is missing, {self.stretches:,} stretches; "
            f"{self.alone:,} pieces are alone, {self.others:,} documents are no piece or a copy of one"
        )


def joined_records(
    files: Sequence[str], max_bad_line_share: float, side: Split | None = None, joining: Joining | None = None
) -> Iterator[Record]:
    """Records `{"text", "timestamp", "url"}` of whole texts, in the order in which the first piece of each appears in the files.

    Where a number is missing the text is cut: what stands on the two sides of a gap was never adjacent. A record whose `url` names no
    piece, or one that was there already, stays as it is. Everything is read before the first record comes, and kept in memory.

    Args:
        files: JSON-lines files (plain, .gz, .xz).
        max_bad_line_share: share of lines that may be skipped.
        side: which records to join; the others are missing from their texts. None: all.
        joining: counts what becomes of them.

    Raises:
        ValueError: too many bad lines, or a damaged file.
    """
    side, joining = side or Split(), joining or Joining()
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
            joining.others += 1
            yield pieces[0]
            continue
        runs = list(_without_gaps(sorted(pieces)))
        joining.add(runs)
        for run in runs:
            first = pieces[run[0]]
            yield {"text": BETWEEN.join(pieces[number]["text"] for number in run), "timestamp": first.get("timestamp", ""), "url": name}


def write_joined(files: Sequence[str], target: Path, max_bad_line_share: float, side: Split | None = None) -> Joining:
    """Write `joined_records` as JSON lines, the whole file or nothing, and say what became of the documents."""
    joining = Joining()
    with replacing(target) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for record in joined_records(files, max_bad_line_share, side, joining):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return joining


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
