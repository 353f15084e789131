"""Rows of a benchmark as tables for a terminal."""

from collections.abc import Callable, Sequence

from rich.table import Table

from mmrec.scripts.measurements import FUSED_REST, Row


def rows_table(rows: Sequence[Row]) -> Table:
    """One line a row."""
    found = Table(title="Medians; products: the same matrix products alone, back to back; MB: of the projections, by arithmetic")
    for title in ("what", "direction", "HEM"):
        found.add_column(title)
    for title in ("ms", "products, ms", "× products", "tokens/s", "peak MiB", "launches", "MB", "timed"):
        found.add_column(title, justify="right")
    for row in rows:
        if row["ms"] is None:
            continue
        layer = row.get("layer")
        found.add_row(
            row["what"] if layer is None else f"{row['what']} {layer}", row["direction"], "on" if row["hem"] else "off",
            _number(row["ms"], ".3f"), _number(row["gemm_only_ms"], ".3f"), _number(row.get("of_gemm_only"), ".2f"),
            _number(row["tokens_per_s"], ",.0f"), _number(row["peak_mib"], ",.0f"), _number(row["launches"], "d"),
            _number(row["bytes"] and row["bytes"] / 1e6, ",.2f"),
            {True: "replayed", False: "called", None: "in the forward"}[row.get("replayed")],
        )  # fmt: skip
    return found


def hem_table(rows: Sequence[Row]) -> Table:
    """The founding document's tables: HEM off, on, and what changes."""
    found = Table(title="HEM: six projections and an eager rest (or, where named so, a fused one), one projection, and the change")
    found.add_column("metric")
    for title in ("off", "on", "change"):
        found.add_column(title, justify="right")
    on = {(row["what"], row["direction"]): row for row in rows if row["hem"] and row["ms"] is not None}
    for row in rows:
        other = on.get((row["what"].removesuffix(FUSED_REST), row["direction"]))
        if row["hem"] or other is None:
            continue
        name = f"{row['what']} {row['direction']}"
        metrics: tuple[tuple[str, str, Callable[[Row], float | None]], ...] = (
            ("ms", ".3f", lambda r: r["ms"]),
            ("matrix products alone, ms", ".3f", lambda r: r["gemm_only_ms"]),
            ("of its matrix products", ".2f", lambda r: r["of_gemm_only"]),
            ("tokens/s", ",.0f", lambda r: r["tokens_per_s"]),
            ("projection launches, forward", "d", lambda r: r["launches"]),
            ("MB of projections, by arithmetic", ",.2f", lambda r: r["bytes"] / 1e6),
            ("MB of projections, ncu", ",.2f", lambda r: r["bytes_ncu"] and r["bytes_ncu"] / 1e6),
            ("peak MiB", ",.0f", lambda r: r["peak_mib"]),
        )
        for metric, form, value in metrics:
            before, after = value(row), value(other)
            if before is None and after is None:
                continue
            change = "–" if not before or after is None else f"{100 * (after / before - 1):+.1f} %"
            found.add_row(f"{name}: {metric}", _number(before, form), _number(after, form), change)
        found.add_section()
    return found


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
