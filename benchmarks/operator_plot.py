"""The benchmark's rows as a picture: how near each comes to the floor, and the long-term memory against others over the length."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

HEADS = 32  # of the rows that are drawn over T


def label(row: dict[str, Any]) -> str:
    """A row in a line."""
    channels = f"H{row['H']}×{row['K']}" if row["H"] else f"D{row['D']}" + (f" P{row['P']}" if row["P"] not in (None, row["D"]) else "")
    gates = " bf16 gates" if row["gate_dtype"] == "bfloat16" else ""
    sums = " float64 sums" if row["accum_dtype"] == "float64" else ""
    window = "".join(f" {name}{row[name]}" for name in "WJ" if row.get(name))
    return f"{row['op']} B{row['B']} T{row['T']} {channels}{window}{gates}{sums}{' packed' if row['reset'] else ''} {row['direction']}"


def over_time(rows: Sequence[dict[str, Any]], direction: str) -> dict[str, list[tuple[int, float]]]:
    """Milliseconds per 1,000 tokens of memory_scan and of its peers by name, over the length, at HEADS heads."""
    lines: dict[str, list[tuple[int, float]]] = {}
    wanted = [
        r for r in rows if r["op"] == "memory_scan" and r["H"] == HEADS and r["direction"] == direction and r["T"] > 1 and not r["reset"]
    ]
    longest_batch = {r["T"]: max(o["B"] for o in wanted if o["T"] == r["T"]) for r in wanted}
    for row in sorted(wanted, key=lambda r: r["T"]):
        if row["B"] != longest_batch[row["T"]]:
            continue
        for name, ms in {"memory_scan": row["ms"], **row["peers"]}.items():
            if ms is not None:
                lines.setdefault(name, []).append((row["T"], 1000 * ms / (row["B"] * row["T"])))
    return lines


def draw_plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the picture; without matplotlib, say so and write none.

    Args:
        rows: of the benchmark.
        path: of the picture; its ending chooses the format.
    """
    timed = [row for row in rows if row["ms"] is not None]
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (it is in the extra `bench`)", flush=True)
        return
    if not timed:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = {direction: over_time(timed, direction) for direction in ("fwd", "fwdbwd")}
    lines = {direction: found for direction, found in lines.items() if any(len(points) > 1 for points in found.values())}
    figure, axes = pyplot.subplots(
        1, 1 + len(lines), figsize=(9 + 5 * len(lines), 2 + 0.22 * len(timed)), width_ratios=[2] + [1] * len(lines), layout="constrained"
    )
    bars, *others = axes if lines else [axes]
    shares = [100 * row["share_of_floor"] for row in timed]
    bars.barh([label(row) for row in timed], shares, color=["C0" if row["direction"] == "fwd" else "C1" for row in timed])
    bars.axvline(100, color="black", linewidth=0.8)
    bars.set_ylim(len(timed) - 0.4, -0.6)  # the first row on top
    bars.set_title("forward blue, forward+backward orange")
    bars.tick_params(axis="y", labelsize=7)
    bars.set_xlabel("% of the floor: the slower of bytes over the copy's rate and FLOPs over the matrix product's")
    for axis, (direction, found) in zip(others, lines.items(), strict=True):
        for name, points in sorted(found.items()):
            own = name == "memory_scan"
            axis.plot(*zip(*points, strict=True), marker="o", label=name, linewidth=2.5 if own else 1.2, color="black" if own else None)
        axis.set(
            xscale="log", yscale="log", xlabel="T", ylabel="ms per 1,000 tokens", title=f"memory_scan {direction}, {HEADS} heads × 128"
        )
        lengths = sorted({length for points in found.values() for length, _ in points})
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axis.minorticks_off()
        axis.legend(fontsize=8)
    row = timed[0]
    figure.suptitle(
        f"{row['gpu']}, torch {row['torch']}, triton {row['triton']}, {row['date']}; copy {row['copy_tbps']:.2f} TB/s", fontsize=10
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
    print(path, flush=True)
