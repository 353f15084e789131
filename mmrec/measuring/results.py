"""Results as files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmrec.files import write_atomically


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows as a JSON list, the whole file or nothing; JSON has no NaN and no infinity: null in their place."""
    write_atomically(path, (json.dumps([finite(row) for row in rows], indent=1, allow_nan=False) + "\n").encode())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON file that `write_rows` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON, or no list of mappings.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON ({error}); write it anew with the script that measures it") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds no list of rows; write it anew with the script that measures it")
    return rows


def finite(value: Any) -> Any:
    """A value of mappings, lists and numbers with None in the place of NaN and infinities."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
