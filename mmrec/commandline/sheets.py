"""Tables for a terminal that never cut a number: one too wide for it is printed in parts, each with the columns that name the rows."""

import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_PIPED = 200  # columns where neither a terminal nor COLUMNS says: as wide as our tables are
_FRAME = 3  # of a column: a line and a space on either side; one line more closes the row
_NARROWEST_NAME = 12  # what a column of names is folded to at the most


@dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
        title: above it.
        names: titles of the columns that name a row; folded where they are too long.
        values: titles of the others, to the right; never cut and never folded, titles broken between their words.
        rows: a cell each, names first; a row of one cell is the heading of those below it.
        ends: numbers of rows after which a line is drawn.
        caption: below it, as plain text.
    """

    title: str
    names: Sequence[str]
    values: Sequence[str]
    rows: Sequence[Sequence[str]]
    ends: Collection[int] = ()
    caption: str | None = None


def show(sheet: Sheet, console: Console | None = None) -> None:
    """Print a table, in as many parts as the width of the terminal, or COLUMNS, asks for; wide where the output is piped.

    Args:
        sheet: what to print.
        console: where; None: the standard output.
    """
    if console is None:
        told = sys.stdout.isatty() or Console().is_terminal or os.environ.get("COLUMNS", "").isdigit()
        console = Console() if told else Console(width=_PIPED)
    parts = _parts(sheet, console.width)
    for number, columns in enumerate(parts):
        table = Table(title=escape(sheet.title) if number == 0 else None)
        for title in sheet.names:
            table.add_column(escape(title), overflow="fold")
        for column in columns:
            table.add_column(escape("\n".join(_lines(sheet.values[column]))), justify="right", no_wrap=True)
        first = len(sheet.names)
        for index, row in enumerate(_whole(sheet)):
            cells = [*row[:first], *(row[first + column] for column in columns)]
            table.add_row(*map(escape, cells), end_section=index in sheet.ends)
        console.print(table)
    if sheet.caption:
        console.print(sheet.caption, markup=False, highlight=False)


def _whole(sheet: Sheet) -> list[list[str]]:
    """The rows, headings filled up with empty cells."""
    width = len(sheet.names) + len(sheet.values)
    return [[*row, *[""] * (width - len(row))] for row in sheet.rows]


def _lines(title: str) -> list[str]:
    """A title broken between its words, single letters and signs kept with the next, or at the end with the one before."""
    lines: list[str] = []
    for word in title.split(" "):
        if lines and ((len(word) == 1 and word == title[-1]) or len(lines[-1].split(" ")[-1]) == 1):
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _parts(sheet: Sheet, width: int) -> list[list[int]]:
    """The value columns of each part: as many as fit beside the names."""
    first, rows = len(sheet.names), _whole(sheet)
    whole = [max(cell_len(sheet.names[column]), *(cell_len(row[column]) for row in rows), 0) for column in range(first)]
    needed = [
        max(*map(cell_len, _lines(title)), *(cell_len(row[first + column]) for row in rows), 0) for column, title in enumerate(sheet.values)
    ]
    everything = sum(whole) + sum(needed) + _FRAME * (len(whole) + len(needed)) + 1
    if everything <= width:
        return [list(range(len(needed)))]
    # Names are folded first, then the columns are divided.
    folded = sum(min(size, max(_NARROWEST_NAME, width // (3 * first))) for size in whole) + _FRAME * first + 1
    parts: list[list[int]] = [[]]
    used = folded
    for column, size in enumerate(needed):
        if parts[-1] and used + size + _FRAME > width:
            parts.append([])
            used = folded
        parts[-1].append(column)
        used += size + _FRAME
    return parts
