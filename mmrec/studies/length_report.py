"""What the screen and a picture show of losses by position."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmrec.studies.length import BIN, FAR
from mmrec.studies.row_file import arm_name
from mmrec.studies.runs import Row
from mmrec.studies.statistics import sure_errors


def networks(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of each network read in windows of each length, by a title."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        sizes = f"{row['params_m']:g} M, {row['tokens_m']:,.0f} M tokens of {row['trained_on']}, lr {row['lr']:g}, seed {row['seed']}"
        found.setdefault(f"{arm_name(row)}, {sizes}, read {row['length']:,} at a time on {row['gpu']}", []).append(row)
    return found


def table(rows: Sequence[Row]) -> str:
    """A line a bin of positions: the loss, and both comparisons, each with its standard error."""
    lines = []
    for title, found in networks(rows).items():
        lines += [title, f"  {'positions':>17}  {'loss':>16}  {'than in training':>18}  {'than restarted':>18}"]
        for row in found:
            if row["what"] == BIN:
                positions, loss, rise, carried = cells(row)
                lines.append(f"  {positions:>17}  {loss:>16}  {rise:>18}  {carried:>18}")
    return "\n".join(lines)


def cells(row: Row) -> list[str]:
    """Of a stretch of positions: which, the loss, and both comparisons, each with its standard error."""
    return [
        _positions(row),
        _cell(row["loss"], row["standard_error"], ".4f"),
        _cell(row["rise"], row["rise_standard_error"], "+.4f"),
        _cell(row["over_restarted"], row["over_restarted_standard_error"], "+.4f"),
    ]


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Whether the loss rises beyond the training's length, a line a network and length; with 95 % confidence, by Student's t over books."""
    return [f"{title}: {verdict(row)}" for title, found in networks(rows).items() for row in found if row["what"] == FAR]


def verdict(row: Row) -> str:
    """Of a network and length, by the row of the positions that are judged."""
    short = row["trained_length"]
    against = f"at {short // 2:,}–{short - 1:,} of the same {row['windows']} windows of {row['books']} books"
    restarted = f"of the same tokens, read anew every {short:,}"
    return f"at {_positions(row)} the loss {_judged(row, 'rise')} that {against}, and {_judged(row, 'over_restarted')} that {restarted}"


def draw(path: Path, rows: Sequence[Row]) -> str:
    """A picture of all networks; the line that says that it was written, or why not."""
    try:
        from mmrec.studies.plots import draw_positions
    except ImportError as error:
        return f"no plot ({error}); pip install matplotlib, then --plot-only"
    draw_positions(path, {title: [row for row in found if row["what"] == BIN] for title, found in networks(rows).items()})
    return f"plot: {path}"


def _judged(row: Row, name: str) -> str:
    value, error = row[name], row[f"{name}_standard_error"]
    if value is None:  # as of a network that has diverged
        return "is no number, not to be compared with"
    if error is None:
        return f"differs by {value:+.4f} (one book: no standard error) from"
    sure = sure_errors(row["books"])
    if abs(value) <= sure * error:
        return f"does not differ beyond {sure:.2f} standard errors ({value:+.4f} ± {error:.4f}) from"
    return f"is {'HIGHER' if value > 0 else 'lower'} ({value:+.4f} ± {error:.4f}) than"


def _positions(row: Row) -> str:
    return f"{row['position_from']:,}–{row['position_to'] - 1:,}"


def _cell(value: Any, error: Any, form: str) -> str:
    if value is None:
        return "–"
    return format(value, form) if error is None else f"{format(value, form)} ± {error:.4f}"
