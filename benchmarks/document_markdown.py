"""Tables in Markdown: cells, captions, and the register of the functions that make them."""

import re
from collections.abc import Callable, Sequence

from document_sources import Measured, Results, Row, Source, values

UNKNOWN = "–"
ASKED_FOR = "A100"  # the GPU that the founding document asks for
OF_NETWORKS = ("hem_", "benchmark_results_", "train_step_", "decode_")
Table = Callable[[Results], str]
TABLES: dict[str, Table] = {}


def table(function: Table) -> Table:
    """Register a function under its own name, by which the template asks for it."""
    TABLES[function.__name__] = function
    return function


def cell(value: float | None, form: str = ",.2f", factor: float = 1.0) -> str:
    """A number, times `factor`; a dash where it is unknown."""
    return UNKNOWN if value is None else format(int(value) if form.endswith("d") else value * factor, form)


def with_spread(row: Row, form: str = ".2f") -> str:
    """A row's milliseconds with the medians of its fastest and its slowest round."""
    fastest, slowest = row.get("fastest_ms"), row.get("slowest_ms")
    spread = "" if fastest is None or slowest is None else f" ({cell(fastest, form)} … {cell(slowest, form)})"
    return cell(row.get("ms"), form) + spread


def change(before: float | None, after: float | None) -> str:
    """From `before` to `after` in percent."""
    return UNKNOWN if not before or after is None else percent(100 * (after / before - 1))


def percent(points: float) -> str:
    """A change in percent, signed unless it rounds to nothing."""
    shown = f"{points:+.1f}"
    return f"{'0.0' if shown in ('-0.0', '+0.0') else shown} %".replace("-", "−")


def within_range(before: Row, after: Row) -> bool:
    """Whether two rows' times, fastest to slowest round, overlap, so that their difference is none."""
    limits = [row.get(key) for row in (before, after) for key in ("fastest_ms", "slowest_ms")]
    if any(limit is None for limit in limits):
        return False
    return max(limits[0], limits[2]) <= min(limits[1], limits[3])


def change_of_times(before: Row, after: Row, key: str = "ms") -> str:
    """`change` of what was timed, or that there is none to be seen."""
    values_known = before.get(key) is not None and after.get(key) is not None
    return "within the range" if values_known and within_range(before, after) else change(before.get(key), after.get(key))


def ratio(above: float | None, below: float | None) -> str:
    """`above / below`."""
    return UNKNOWN if not below or above is None else f"{above / below:.2f} ×"


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = (0,)) -> str:
    """A table; columns of words to the left, the others, numbers, to the right."""
    bars = ["---" if column in words else "---:" for column in range(len(titles))]
    return "\n".join("| " + " | ".join(line).replace("|  |", "| |") + " |" for line in (titles, bars, *rows))


def captioned(body: str, *captions: str) -> str:
    """A table and what is said below it."""
    return (
        "\n\n".join([body, *(f"*{caption}*" for caption in captions if caption)]) if body else "\n\n".join(f"*{c}*" for c in captions if c)
    )


def measured_caption(measured: Measured, rows: Sequence[Row], command: str | Sequence[str], stands_in: bool = False) -> str:
    """Where rows come from: GPU, versions, date, file, command.

    Args:
        measured: the file.
        rows: those in the table.
        command: what wrote them, where the rows do not say it themselves.
        stands_in: whether the founding document asks for an A100 here.
    """
    told = {key: ", ".join(str(value) for value in values(rows, key)) or UNKNOWN for key in ("gpu", "torch", "triton", "date")}
    place = f"Measured on {told['gpu']} with torch {told['torch']} and Triton {told['triton']}, {told['date']}"
    other = stands_in and ASKED_FOR not in told["gpu"]
    instead = f"; it stands in for the {ASKED_FOR} 80 GB that the founding document asks for" if other else ""
    # Rows of networks say how many windows these have; when none had any they did not.
    before = measured.path.name.startswith(OF_NETWORKS) and any("windows" not in row for row in rows)
    of_what = " Of networks without windows, as they were then." if before else ""
    commands = values(rows, "command") or ([command] if isinstance(command, str) else command)
    # Wherever it was written to then, `make docs` reads it here.
    written = ", ".join("`" + re.sub(r"--output \S+", f"--output benchmarks/results/{measured.path.name}", one) + "`" for one in commands)
    return f"{place}{instead}.{of_what} [{measured.path.name}](../benchmarks/results/{measured.path.name}), written by {written}."


def owed_caption(source: Source, command: str | None = None) -> str:
    """What is said where a file, or its rows for a table, are not there yet; `command` would write them, None: the file's own."""
    if not source.has_script():
        return (
            f"Not measured yet: `{command or source.command}`, which is to write `benchmarks/results/{source.pattern}`, is not written yet."
        )
    of = f"`benchmarks/results/{source.pattern}`"
    return (
        f"Not measured yet: nothing of this in {of}. On a GPU, `{command or source.command}` writes it, and `make docs` fills this table."
    )
