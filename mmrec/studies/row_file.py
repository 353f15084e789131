"""Rows of a study: a file of them, groups of them."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmrec.commandline.errors import BadInputError
from mmrec.measuring.results import finite, read_rows, write_rows
from mmrec.studies.runs import Row


class RowFile:
    """A JSON file of rows, in which a row takes the place of the one with the same identity.

    Args:
        path: of the file. What is there already is read.
        identity: columns that tell a row from all others.

    Raises:
        ValueError: a file that holds no rows.
    """

    def __init__(self, path: Path, identity: Sequence[str]) -> None:
        self.path = path
        self._identity = tuple(identity)
        self.rows: list[Row] = read_rows(path) if path.is_file() else []

    def identity(self, row: Row) -> tuple[Any, ...]:
        """What two rows of one and the same thing share."""
        return tuple(row.get(name) for name in self._identity)

    def lacks(self, known: Row) -> bool:
        """Whether no row has these values in those columns of the identity that `known` has."""
        wanted = [(name, known[name]) for name in self._identity if name in known]
        return not any(all(row.get(name) == value for name, value in wanted) for row in self.rows)

    def put(self, rows: Iterable[Row]) -> None:
        """Take rows in, NaN as None as the file will have it, and leave out those they replace."""
        new = [finite(row) for row in rows]
        replaced = {self.identity(row) for row in new}
        self.rows = [row for row in self.rows if self.identity(row) not in replaced] + new

    def require_rows(self) -> None:
        """Raise BadInputError where there is nothing to draw."""
        if not self.rows:
            raise BadInputError(f"--plot-only: no rows in {self.path}; train first, or name another file with --output")

    def write(self) -> None:
        """The whole file or nothing."""
        write_rows(self.path, self.rows)


def grouped(rows: Iterable[Row], names: Sequence[str]) -> list[list[Row]]:
    """Rows that agree in some columns, in the order in which their values appear."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return list(groups.values())


def arm_name(row: Row) -> str:
    """What a row's network is called: by its kind, ours by what it differs in, if in anything."""
    model, variant = row["model"], row["variant"]
    return str(variant if variant and model == "mm-rec" else model if variant is None else f"{model}, {variant}")
