"""Rows of a benchmark as tables for a terminal."""

from collections.abc import Callable, Sequence

from mmrec.commandline.sheets import Sheet
from mmrec.scripts.measurements import FUSED_REST, Row


def rows_table(rows: Sequence[Row]) -> Sheet:
    """One line a row."""
    lines = []
    for row in rows:
        if row["ms"] is None:
            continue
        layer = row.get("layer")
        cells = (
            row["what"] if layer is None else f"{row['what']} {layer}", row["memory"] or "–", row["direction"],
            "on" if row["hem"] else "off", _number(row["ms"], ".3f"), _spread(row),
            _number(row["gemm_only_ms"], ".3f"), _number(row.get("of_gemm_only"), ".2f"),
            _number(row["tokens_per_s"], ",.0f"), _number(row["peak_mib"], ",.0f"), _number(row["launches"], "d"),
            _number(row["bytes"] and row["bytes"] / 1e6, ",.2f"),
            {True: "replayed", False: "called", None: "in the forward"}[row.get("replayed")],
        )  # fmt: skip
        lines.append(cells)
    titles = ("ms", "fastest … slowest", "products, ms", "× products", "tokens/s", "peak MiB", "launches", "MB", "timed")
    note = "Medians of rounds; products: the same matrix products alone, back to back; MB: of the projections, by arithmetic"
    return Sheet("The network as it is", ("what", "memory", "direction", "HEM"), titles, lines, caption=note)


def hem_table(rows: Sequence[Row]) -> Sheet:
    """The founding document's tables: HEM off, on, and what changes."""
    on = {(row["what"], row["memory"], row["direction"]): row for row in rows if row["hem"] and row["ms"] is not None}
    lines: list[tuple[str, ...]] = []
    ends: list[int] = []
    for row in rows:
        what = row["what"].removesuffix(FUSED_REST)
        other = on.get((what, row["memory"], row["direction"]))
        if row["hem"] or other is None:
            continue
        rest = "fused passes" if row["what"].endswith(FUSED_REST) else "eager passes"
        memory = f" with a {row['memory']}" if row["memory"] else ""
        lines.append((f"{what}{memory} {row['direction']}, {rest}",))
        metrics: tuple[tuple[str, str, Callable[[Row], float | None]], ...] = (
            ("ms", ".3f", lambda r: r["ms"]),
            ("products alone, ms", ".3f", lambda r: r["gemm_only_ms"]),
            ("× its products", ".2f", lambda r: r["of_gemm_only"]),
            ("tokens/s", ",.0f", lambda r: r["tokens_per_s"]),
            ("projection launches", "d", lambda r: r["launches"]),
            ("projections, MB", ",.2f", lambda r: r["bytes"] / 1e6),
            ("projections, MB by ncu", ",.2f", lambda r: r["bytes_ncu"] and r["bytes_ncu"] / 1e6),
            ("peak MiB", ",.0f", lambda r: r["peak_mib"]),
        )
        for metric, form, value in metrics:
            before, after = value(row), value(other)
            if before is None and after is None:
                continue
            change = "–" if not before or after is None else f"{round(100 * (after / before - 1), 1) + 0.0:+.1f} %"
            lines.append((f"  {metric}", _number(before, form), _number(after, form), change))
            if metric == "ms":
                lines.append(("  fastest … slowest round", _spread(row), _spread(other), ""))
        ends.append(len(lines) - 1)
    note = (
        "Off: six projections, the passes around them eager or fused; on: one projection, fused passes. Products: the same matrix "
        "products alone. MB by arithmetic unless by ncu; launches of a forward."
    )
    return Sheet("HEM off and on", ("metric",), ("off", "on", "change"), lines, ends, note)


def _spread(row: Row) -> str:
    """The medians of the fastest and the slowest round."""
    fastest, slowest = row.get("fastest_ms"), row.get("slowest_ms")
    return "–" if fastest is None or slowest is None else f"{fastest:.3f} … {slowest:.3f}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
