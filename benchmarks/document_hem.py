"""The tables of section 1.1: HEM off and on, launches, memory traffic; and section 4.1, the network layer by layer."""

from collections.abc import Callable, Iterator, Sequence
from string import ascii_uppercase

from document_markdown import (
    UNKNOWN,
    captioned,
    cell,
    change,
    change_of_times,
    markdown,
    measured_caption,
    owed_caption,
    percent,
    ratio,
    table,
    with_spread,
)  # fmt: skip
from document_sources import HEM, NETWORK, Measured, Results, Row, first, groups, with_values

from mmrec.scripts.benchmark_options import MEMORIES
from mmrec.scripts.measurements import DIRECTIONS, FUSED_REST

# What the founding document predicts, in MB of one block's projections at B 4 × T 2048 × D 4096 in BF16: six matmuls, HEM.
PREDICTED_MB = {"weights": (201.33, 201.33), "inputs": (402.66, 67.11), "total": (603.99, 268.44)}
PREDICTED_LATENCY = "−30 … −40 %"
HOPED_LATENCY = -30  # percent, its nearer end
LAYERS = 24
FOUNDING_HEADS = 8  # of the long-term memory, in the founding document's network


def settings_of(rows: Sequence[Row]) -> list[tuple[tuple, list[Row]]]:
    """Rows by sizes, UBÖO and precision; many heads first, as the shipped configs have them."""
    keys = ("B", "T", "D", "H", "precision", "uboo")
    found = groups(rows, lambda row: tuple(row.get(key) for key in keys))
    return sorted(found, key=lambda item: -(item[0][3] or 0))


def named(setting: tuple) -> str:
    """A setting in words."""
    B, T, D, H, precision, uboo = setting
    return f"B {B} × T {T}, D {D}, {H} heads, {precision}, UBÖO {'on' if uboo else 'off'}"


def command_of(module: str, setting: tuple, rows: Sequence[Row], more: str = "") -> str:
    """The command that measures a setting, with `more` options."""
    B, T, D, H, precision, uboo = setting
    size = "--size 7b" if D == 4096 else f"--model-dim {D}"
    switches = " --uboo" * bool(uboo) + " --ncu" * any(row.get("bytes_ncu") is not None for row in rows)
    return f"python -m mmrec.scripts.{module} {size} --num-heads {H} --batch {B} --seq-len {T} --precision {precision}{switches}{more}"


def of_memory(rows: Sequence[Row], memory: str) -> list[Row]:
    """The rows of blocks and layers with a memory of MEMORIES; those that do not say, whole networks' and old ones, count as a matrix's."""
    return [row for row in rows if (row.get("memory") or "matrix") == memory]


def three_forms(rows: Sequence[Row], what: str, direction: str, memory: str = "matrix") -> tuple[Row, Row, Row]:
    """Six projections with an eager rest, six with a fused rest, one with a fused rest; of a block those with a memory."""
    rows = of_memory(rows, memory)
    return (
        first(rows, what=what, direction=direction, hem=False),
        first(rows, what=f"{what}{FUSED_REST}", direction=direction),
        first(rows, what=what, direction=direction, hem=True),
    )


def letters(found: Sequence[tuple[tuple, list[Row]]]) -> Iterator[tuple[str, tuple, list[Row]]]:
    """Settings with the names that the tables call them by."""
    for letter, (setting, rows) in zip(ascii_uppercase, found, strict=False):
        yield f"setting {letter}", setting, rows


def _each_setting(results: Results, body: Callable[[Sequence[Row]], str]) -> str:
    measured = results.of(HEM)
    if measured is None:
        return captioned(body([]), owed_caption(HEM))
    found = letters(settings_of(measured.rows))
    return "\n\n".join(f"{name[0].upper()}{name[1:]}, {setting[3]} heads:\n\n{body(rows)}" for name, setting, rows in found)


@table
def hem_settings(results: Results) -> str:
    """§1.1: the settings, where they were measured, and what of them is not."""
    measured = results.of(HEM)
    if measured is None:
        return captioned("", owed_caption(HEM))
    lines = []
    for name, setting, rows in letters(settings_of(measured.rows)):
        into = f" --output benchmarks/results/{measured.path.name}"
        whole = any(row.get("what") == f"forward_{LAYERS}" for row in rows)
        append = "" if name.endswith("A") else " --append"
        command = command_of("benchmark_hem", setting, rows, f"{'' if whole else ' --only block'}{append}{into}")
        lines.append(f"- **{name[0].upper()}{name[1:]}**: {named(setting)}. {measured_caption(measured, rows, command, stands_in=True)}")
        if not whole:
            missing = command_of("benchmark_hem", setting, rows, f" --only forward --append{into}")
            lines.append(f"  Not measured yet: the forward of {LAYERS} layers (rows `forward_{LAYERS}`); on a GPU, `{missing}` writes it.")
    if not any(row.get("H") == FOUNDING_HEADS for row in measured.rows):
        options = f"--size 7b --num-heads {FOUNDING_HEADS} --append --output benchmarks/results/{measured.path.name}"
        lines.append(f"- Not measured yet there: {FOUNDING_HEADS} heads; `python -m mmrec.scripts.benchmark_hem {options}` adds them.")
    if of_memory(measured.rows, "window"):
        lines.append(
            "- Blocks with a window have lines of their own in the table of latencies; all else said of one block is of one with a matrix."
        )
    return "\n".join(lines)


@table
def hem_verdict(results: Results) -> str:
    """§1.1.1: what is to be made of it."""
    measured = results.of(HEM)
    lines = []
    for name, setting, rows in letters(settings_of(measured.rows)) if measured else ():
        (eager, fused, one), both = three_forms(rows, "block", "fwd"), three_forms(rows, "block", "fwdbwd")
        gained = None if not eager.get("ms") or one.get("ms") is None else 100 * (one["ms"] / eager["ms"] - 1)
        if gained is None or eager.get("gemm_only_ms") is None or fused.get("ms") is None:
            continue
        reached = "was reached" if round(gained, 1) <= HOPED_LATENCY else "was not reached"
        lines.append(
            f"- On {eager.get('gpu')}, {name} ({setting[3]} heads), the {-HOPED_LATENCY} % {reached} ({percent(gained)}): the products "
            f"alone take {eager['gemm_only_ms']:.1f} of the eager block's {eager['ms']:.1f} ms, so that a block without any other work "
            f"would be at "
            f"{change(eager['ms'], eager['gemm_only_ms'])}. Of it the one projection by itself: {_alone(fused, one)} forward, "
            f"{_alone(*both[1:])} with backward. The gain is that of the fused passes around it: "
            f"{change_of_times(eager, fused)} forward, {change_of_times(*both[:2])} with backward."
        )
    return "\n".join(lines) or captioned("", owed_caption(HEM))


def _alone(fused: Row, one: Row) -> str:
    found = change_of_times(fused, one)
    return "nothing measurable (the ranges overlap)" if found == "within the range" else found


@table
def hem_latency(results: Results) -> str:
    """§1.1.1: latency and throughput."""

    def body(rows: Sequence[Row]) -> str:
        lines = []
        windows = (
            ("One block with a window, forward, ms", "block", "fwd", UNKNOWN, "window"),
            ("One block with a window, forward and backward, ms", "block", "fwdbwd", UNKNOWN, "window"),
        )
        for title, what, direction, predicted, memory in (
            ("One block, forward, ms", "block", "fwd", PREDICTED_LATENCY, "matrix"),
            ("One block, forward and backward, ms", "block", "fwdbwd", UNKNOWN, "matrix"),
            *(windows if of_memory(rows, "window") else ()),
            (f"Forward pass, {LAYERS} layers, ms", f"forward_{LAYERS}", "fwd", UNKNOWN, "matrix"),
        ):
            forms = three_forms(rows, what, direction, memory)
            reached = UNKNOWN
            if predicted != UNKNOWN and forms[0].get("ms") and forms[2].get("ms") is not None:
                reached = "yes" if round(100 * (forms[2]["ms"] / forms[0]["ms"] - 1), 1) <= HOPED_LATENCY else "no"
            compared = [change_of_times(forms[0], forms[2]), change_of_times(forms[1], forms[2])]
            lines.append([title, *map(with_spread, forms), predicted, compared[0], reached, compared[1]])
        for title, what, key, form in (
            ("Throughput of one block's forward, tokens/s", "block", "tokens_per_s", ",.0f"),
            (f"Throughput of {LAYERS} layers, tokens/s", f"forward_{LAYERS}", "tokens_per_s", ",.0f"),
            ("Peak of one block's forward, MiB", "block", "peak_mib", ",.0f"),
        ):
            forms = three_forms(rows, what, "fwd")
            timed = key == "tokens_per_s"
            compared = [
                change_of_times(before, forms[2], key) if timed else change(before.get(key), forms[2].get(key)) for before in forms[:2]
            ]
            figures = [cell(row.get(key), form) for row in forms]
            lines.append([title, *figures, UNKNOWN, compared[0], UNKNOWN, compared[1]])
        titles = (
            "metric", "six matmuls, eager rest", "six matmuls, fused rest", "HEM", "predicted", "measured: HEM against six, eager rest",
            "reached", "HEM against six, fused rest",
        )  # fmt: skip
        return markdown(titles, lines)

    return _each_setting(results, body)


@table
def hem_products(results: Results) -> str:
    """§1.1.1: how near a block comes to its matrix products alone."""

    def body(rows: Sequence[Row]) -> str:
        lines = []
        for title, direction in (("forward", "fwd"), ("forward and backward", "fwdbwd")):
            for form, row in zip(
                ("six matmuls, eager rest", "six matmuls, fused rest", "HEM"), three_forms(rows, "block", direction), strict=True
            ):
                share = ratio(row.get("ms"), row.get("gemm_only_ms"))
                lines.append([f"One block, {title}, {form}", cell(row.get("ms")), cell(row.get("gemm_only_ms")), share])
        return markdown(("what", "ms", "the same matrix products alone, ms", "ratio"), lines)

    return _each_setting(results, body)


@table
def hem_launches(results: Results) -> str:
    """§1.1.2: kernel launches."""

    def body(rows: Sequence[Row]) -> str:
        predicted = {"Launches of the projections, one block's forward": ("6", "1", "−83.3 %")}
        lines = []
        for title, what, direction, key in (
            ("Launches of the projections, one block's forward", "block", "fwd", "launches"),
            (f"Launches of the projections, forward of {LAYERS} layers", f"forward_{LAYERS}", "fwd", "launches"),
            ("All kernels of one block's forward", "block", "fwd", "kernels"),
            ("All kernels of one block's forward and backward", "block", "fwdbwd", "kernels"),
        ):
            found = [row.get(key) for row in three_forms(rows, what, direction)]
            hoped = predicted.get(title, (UNKNOWN,) * 3)
            lines.append([title, *hoped, *(cell(value, "d") for value in found), change(found[0], found[2])])
        titles = (
            "metric",
            "predicted: six",
            "predicted: HEM",
            "predicted change",
            "six, eager rest",
            "six, fused rest",
            "HEM",
            "measured change",
        )
        return markdown(titles, lines)

    return _each_setting(results, body)


@table
def hem_traffic(results: Results) -> str:
    """§1.1.3: memory traffic of the projections."""

    def body(rows: Sequence[Row]) -> str:
        off, _, on = three_forms(rows, "block", "fwd")

        def line(title: str, key: str, predicted: tuple[float, float] | None) -> list[str]:
            before, after = off.get(key), on.get(key)
            hoped = [UNKNOWN] * 3 if predicted is None else [*map(cell, predicted), change(*predicted)]
            return [title, *hoped, cell(before, factor=1e-6), cell(after, factor=1e-6), change(before, after)]

        lines = [
            line("Weights read, MB", "bytes_weights", PREDICTED_MB["weights"]),
            line("Inputs read, MB", "bytes_inputs", PREDICTED_MB["inputs"]),
            line("Outputs written, MB", "bytes_outputs", None),
            line("All, MB (the prediction leaves the outputs out)", "bytes", PREDICTED_MB["total"]),
            line("All, MB, counted by ncu", "bytes_ncu", None),
        ]
        return markdown(("one block's projections", "predicted: six", "predicted: HEM", "predicted change", "six", "HEM", "change"), lines)

    note = ""
    measured = results.of(HEM)
    if measured is not None:
        reasons = {row.get("bytes_ncu_reason") for row in with_values(measured.rows, what="block", direction="fwd")} - {None}
        said = ["it was not taken (run with `--ncu`)" if reason.startswith("not asked for") else reason for reason in sorted(reasons)]
        note = "\n\n" + captioned("", f"ncu's count: {', '.join(said)}.") if reasons else ""
    return _each_setting(results, body) + note


# ---- §4.1


@table
def network_baseline(results: Results) -> str:
    """§4.1: the metrics of real_benchmark."""
    measured = results.of(NETWORK)
    if measured is None:
        return captioned("", owed_caption(NETWORK))
    return "\n\n".join(_network(measured, setting, rows) for setting, rows in settings_of(measured.rows))


def _of_layers(rows: Sequence[Row]) -> str:
    """Range and mean of what layers take within the forward."""
    layers = [row["ms"] for row in with_values(rows, what="layer") if row.get("ms") is not None]
    return f"{min(layers):.2f} … {max(layers):.2f}, mean {sum(layers) / len(layers):.2f}" if layers else UNKNOWN


def _network(measured: Measured, setting: tuple, rows: Sequence[Row]) -> str:
    of_matrices, of_windows = (of_memory(rows, memory) for memory in MEMORIES)
    block, both = (first(of_matrices, what="block", direction=direction) for direction in DIRECTIONS)
    window, window_both = (first(of_windows, what="block", direction=direction) for direction in DIRECTIONS)
    whole = next((row for row in rows if str(row.get("what")).startswith("forward_")), {})
    head = first(rows, what="head").get("ms")
    windows = whole.get("windows") or 0
    parts = [(whole["L"] - windows, block), (windows, window), (1, {"ms": head})] if whole.get("L") else []
    times = [row.get("ms") and number * row["ms"] for number, row in parts if number]
    sum_ms = None if not times or None in times else sum(times)
    with_window = [
        ["Block with a window: latency, forward, ms", with_spread(window)],
        ["Block with a window: latency, forward and backward, ms", with_spread(window_both)],
        ["Block with a window: throughput of the forward, tokens/s", cell(window.get("tokens_per_s"), ",.0f")],
        ["Block with a window: peak memory, forward and backward, MiB", cell(window_both.get("peak_mib"), ",.0f")],
        ["Latency of a layer with a window within the forward, ms", _of_layers(of_windows)],
    ]
    lines = [
        ["Block latency, forward, ms", with_spread(block)],
        ["Block latency, forward and backward, ms", with_spread(both)],
        [f"Model forward, {whole.get('L', UNKNOWN)} layers, ms", with_spread(whole)],
        ["Model forward against layers × block + head", ratio(whole.get("ms"), sum_ms)],
        ["Model forward against its matrix products alone", ratio(whole.get("ms"), whole.get("gemm_only_ms"))],
        ["Throughput of the model's forward, tokens/s", cell(whole.get("tokens_per_s"), ",.0f")],
        ["Throughput of one block, tokens/s", cell(block.get("tokens_per_s"), ",.0f")],
        ["Peak memory, one block's forward and backward, MiB", cell(both.get("peak_mib"), ",.0f")],
        ["Peak memory, model forward, MiB", cell(whole.get("peak_mib"), ",.0f")],
        ["Latency of a layer within the forward, ms", _of_layers(of_matrices)],
        ["Latency of the head within the forward, ms", cell(head)],
        *(with_window if of_windows else ()),
    ]
    caption = measured_caption(
        measured, rows, command_of("real_benchmark", setting, rows, f" --output benchmarks/results/{measured.path.name}"), stands_in=True
    )
    return captioned(markdown(("metric, HEM on", "measured"), lines), f"{named(setting)}. {caption}")
