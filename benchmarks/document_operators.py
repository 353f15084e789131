"""The tables of section 4: operators, decoding and prefill."""

import torch
from decode_options import WORSE, limit_of
from document_markdown import UNKNOWN, captioned, cell, markdown, measured_caption, owed_caption, table
from document_sources import DECODING, OPERATORS, Results, Row, groups, with_values

from mmrec.model import MMRecModel
from mmrec.scripts.benchmark_options import PRESETS, preset


@table
def operators(results: Results) -> str:
    """Time against the floor, and the others."""
    measured = results.of(OPERATORS)
    assert measured is not None  # not owed
    timed = [row for row in measured.rows if row.get("ms") is not None and row.get("floor_ms") is not None]
    shown = [row for row in timed if row.get("gate_dtype") == "float32" or row.get("gate_dtype") is None]
    lines = [
        [
            f"`{row['op']}`", _shape(row), str(row.get("direction")), cell(row["ms"], ".3f"), cell(row["floor_ms"], ".3f"),
            cell(row.get("share_of_floor"), ".0f", 100) + " %", cell(row.get("max_rel_err"), ".0e"), _peers(row),
        ]
        for row in shown
    ]  # fmt: skip
    titles = ("operator", "shape", "direction", "ms", "floor, ms", "share of the floor", "largest error", "others, ms")
    rates = ", ".join(sorted({f"{row['copy_tbps']:.2f}" for row in shown if row.get("copy_tbps")}))
    caption = (
        f"fp32 log-gates; {len(timed) - len(shown)} rows with bf16 ones are in the file. Floor: the bytes of the tensors passed over the "
        f"copy rate of the same run ({rates} TB/s), or FLOPs over its GEMM rate, whichever is longer. The others as they are called in "
        "[operator_peers.py](../benchmarks/operator_peers.py), each in its own layout and dtype: accelerated_scan takes bf16 decays, in a "
        "(B, D, T) layout, where `linear_scan` reads fp32 logs, so that its floor is lower. "
    )
    return captioned(markdown(titles, lines, words=(0, 1, 2, 7)), caption + measured_caption(measured, shown, OPERATORS.command))


def _shape(row: Row) -> str:
    heads = f"H {row['H']} × {row['K']}" if row.get("H") else f"D {row.get('D')}"
    if row.get("P") not in (None, row.get("D")):
        heads += f", P {row['P']}"
    heads += "".join(f", {name} {row[name]}" for name in "WJ" if row.get(name))
    sums = f", {row['accum_dtype']} sums" if row.get("accum_dtype") else ""
    return f"B {row.get('B')} × T {row.get('T')}, {heads}, {row.get('dtype')}{sums}{', document starts' if row.get('reset') else ''}"


def _peers(row: Row) -> str:
    peers = row.get("peers") or {}
    return ", ".join(f"{name} {cell(ms, '.3f')}" for name, ms in peers.items() if ms is not None) or UNKNOWN


@table
def decoding(results: Results) -> str:
    """A token, and a long prompt, at the cost of the weights."""
    measured = results.of(DECODING)
    if measured is None:
        return captioned("", owed_caption(DECODING))
    rows = sorted((row for row in measured.rows if row.get("what") != "parity"), key=_order)
    lines = [
        [
            str(row.get("what", UNKNOWN)), str(row.get("path") or UNKNOWN), _network(row), _precision(row, measured.rows),
            cell(row.get("B"), "d"),
            cell(row.get("context"), ",d"), cell(row.get("chunk_size"), ",d"), cell(row.get("ms"), ",.3f"),
            cell(row.get("floor_ms"), ",.3f"),
            UNKNOWN if row.get("share_of_floor") is None else f"{100 * row['share_of_floor']:.0f} %",
            cell(row.get("tokens_per_s"), ",.0f"), cell(row.get("peak_mib"), ",.0f"),
        ]
        for row in rows
    ]  # fmt: skip
    titles = (
        "what",
        "how",
        "network",
        "precision",
        "B",
        "tokens read",
        "chunk_size",
        "ms",
        "floor, ms",
        "share of the floor",
        "tokens/s",
        "peak MiB",
    )
    inferred = [row for row in rows if not row.get("precision") and _precision(row, measured.rows) != UNKNOWN]
    told = "The precision is told by the bytes that a step moved: rows of then do not name it. " if inferred else ""
    caption = told + measured_caption(measured, rows, DECODING.command)
    return captioned(markdown(titles, lines, words=(0, 1, 2, 3)), _over_context(rows), _parity(measured.rows), caption)


def _over_context(rows: list[Row]) -> str:
    """How far the time of a token moves with what was read before it."""
    decoded = [row for row in rows if row.get("what") == "decode" and row.get("B") == 1 and row.get("ms") is not None]
    ways = [{row["context"]: row["ms"] for row in found} for _, found in groups(decoded, lambda row: row.get("path"))]
    timed = max(ways, key=len, default={})  # the way that was timed at several lengths
    if len(timed) < 2:
        return ""
    apart = max(timed.values()) / min(timed.values()) - 1
    return f"One sequence, {min(timed):,} to {max(timed):,} tokens read: the slowest token takes {100 * apart:.1f} % more than the fastest."


def _parity(rows: list[Row]) -> str:
    found = [row for row in rows if row.get("what") == "parity"]
    missed = sum(not row.get("agrees") for row in found)
    told = []
    for row in found:
        if row.get("error") is not None and row.get("error_of_step") is not None:
            limit = row.get("limit", limit_of(row["error_of_step"]))
            told.append(f"{row.get('path', UNKNOWN)} B {row.get('B', UNKNOWN)} {row['error']:.4f}, limit {limit:.4f}")
    errors = f" Relative errors: {'; '.join(told)} (the limit: {WORSE} times that of the network's own step)." if told else ""
    return f"Logits against an fp32 copy's, {len(found)} settings: {missed} missed.{errors}" if found else ""


WHATS = ("decode", "generate", "prefill")


def _order(row: Row) -> tuple[int, str, int, int, int]:
    """By what was done, how, sequences, tokens a time, tokens read."""
    what = row.get("what")
    place = WHATS.index(what) if what in WHATS else len(WHATS)
    return place, str(row.get("path") or ""), *(row.get(key) or 0 for key in ("B", "chunk_size", "context"))


def _precision(row: Row, rows: list[Row]) -> str:
    """A row's precision; of rows that do not say it, by the bytes a weight that a step of the file's moved."""
    if row.get("precision"):
        return str(row["precision"])
    sizes = {key: row.get(key) for key in ("D", "H", "L")}
    moved = min((other["bytes"] for other in with_values(rows, **sizes) if other.get("bytes")), default=None)
    if moved is None or None in sizes.values():
        return UNKNOWN
    for size in PRESETS:
        config = preset(size)
        if (config.model_dim, config.heads, config.num_layers) == tuple(sizes.values()):
            with torch.device("meta"):
                weights = MMRecModel(config).num_parameters()
            return {2: "bf16", 4: "fp32"}.get(round(moved / weights), UNKNOWN)
    return UNKNOWN


def _network(row: Row) -> str:
    sizes = [f"{letter} {row[letter]}" for letter in ("L", "D", "H") if row.get(letter) is not None]
    return ", ".join(sizes) or UNKNOWN
