"""The tables of training: steps of the shipped configs, and what UBÖO takes at 7B (section 1.2.2)."""

from collections.abc import Sequence

from document_markdown import UNKNOWN, captioned, cell, change, markdown, measured_caption, owed_caption, table
from document_sources import TRAINING, Measured, Results, Row, groups
from train_step_cases import DEFAULT

UBOO_7B = ("7b_planning", "7b_planning_compiled")  # cases: the first that was measured is taken
# The founding document's arithmetic: two D × D matrices a layer in BF16, and one layer's activations.
D, LAYERS, BF16 = 4096, 24, 2
PREDICTED_WEIGHTS = LAYERS * 2 * D * D * BF16
PREDICTED_ACTIVATIONS = 268.44e6
HOPED_SHARE, HOPED_BYTES = 10, 2e9  # its hope at the most: percent of the peak, and bytes
GIB = 2**30


def uboo_rows(rows: Sequence[Row]) -> tuple[Row, Row]:
    """The rows of 7B with UBÖO off and on."""
    for case in UBOO_7B:
        found = {row.get("uboo"): row for row in rows if row.get("case") == case and "failed" not in row}
        if {False, True} <= found.keys():
            return found[False], found[True]
    return {}, {}


@table
def uboo_memory(results: Results) -> str:
    """§1.2.2: what UBÖO adds."""
    measured = results.of(TRAINING)
    off, on = uboo_rows(measured.rows) if measured else ({}, {})

    def line(title: str, key: str, predicted: float | None, form: str = ".2f") -> list[str]:
        before, after = off.get(key), on.get(key)
        added = None if before is None or after is None else after - before
        hoped = cell(predicted and predicted / GIB)
        return [title, hoped, cell(before, form), cell(after, form), cell(added, f"+{form}"), change(before, after)]

    total = PREDICTED_WEIGHTS + PREDICTED_ACTIVATIONS
    lines = [
        line("Weights, GiB", "weights_gib", PREDICTED_WEIGHTS),
        line("Activations, GiB", "activations_gib", PREDICTED_ACTIVATIONS),
        line("Peak of forward and backward, GiB", "peak_gib", total),
        line("Forward and backward, ms", "ms_per_step", None, ",.1f"),
    ]
    body = markdown(("7B", "predicted addition", "UBÖO off", "UBÖO on", "measured addition", "change"), lines)
    if measured is None or not (off and on):
        return captioned(body, owed_caption(TRAINING, f"{TRAINING.command} --only {UBOO_7B[0]}"))
    caption = measured_caption(measured, [off, on], f"{TRAINING.command} --only {on['case']}", stands_in=True)
    drawn = f", {on['extrapolated']}" if on.get("extrapolated") else ""
    return captioned(body, f"{_shape(on)}, {_how(on)}, nothing recomputed{drawn}. {caption}")


@table
def training_step(results: Results) -> str:
    """§4.4: training steps of the shipped configs."""
    measured = results.of(TRAINING)
    if measured is None:
        return captioned("", owed_caption(TRAINING))
    rows = [row for row in measured.rows if row.get("case") not in UBOO_7B and "failed" not in row and row.get("ms_per_step") is not None]
    failed = [f"`{row.get('case')}`: {row['failed']}" for row in measured.rows if "failed" in row]
    lines = [
        [
            f"`{row.get('case')}`: {row.get('what', UNKNOWN)}", cell(row.get("params_m"), ",.0f"), _uboo(row), _shape(row), _how(row),
            cell(row.get("tokens_per_s"), ",.0f"),
            _step(row), cell(row.get("host_ms"), ",.1f"), _percent(row.get("mfu")), cell(row.get("peak_gib"), ".1f"),
            cell(row.get("first_step_s"), ".1f"), _loss(row), _peers(row),
        ]
        for row in rows
    ]  # fmt: skip
    titles = (
        "case", "M parameters", "UBÖO", "a step", "how", "tokens/s", "ms a step", "host, ms (beside the GPU)", "MFU", "peak, GiB",
        "first step, s", "loss (after steps)", "others, tokens/s",
    )  # fmt: skip
    unmeasured = f"Not measured: {'; '.join(failed)}." if failed else ""
    cases = [str(row.get("case")) for row in rows]
    return captioned(
        markdown(titles, lines, words=(0, 2, 3, 4, 12)),
        measured_caption(measured, rows, commands_of(cases)),
        "Losses of random tokens; those after different numbers of steps are not to be compared." if any(map(_loss_step, rows)) else "",
        unmeasured,
        owed_cases(measured),
    )


def commands_of(cases: Sequence[str]) -> list[str]:
    """What measures cases, a command for each group of settings; a case's name ends with those it was changed by."""
    found = groups(cases, lambda case: tuple(case.split(" ")[1:]))
    lines = []
    for settings, together in found:
        only = ",".join(case.split(" ")[0] for case in together)
        lines.append(" ".join([TRAINING.command, "--only", only, *(f"--set {setting}" for setting in settings)]))
    return lines


def owed_cases(measured: Measured) -> str:
    """The cases of a whole run that the file does not hold."""
    there = {row.get("case") for row in measured.rows}
    missing = [case for case in DEFAULT if case not in there and case not in UBOO_7B]
    names = ", ".join(f"`{case}`" for case in missing)
    return f"Not measured yet: {names}: `{TRAINING.command} --only {','.join(missing)}` on a GPU." if missing else ""


def _loss_step(row: Row) -> int | None:
    return row.get("loss_step")


def _loss(row: Row) -> str:
    return UNKNOWN if row.get("loss") is None else f"{row['loss']:.4f} ({cell(_loss_step(row), 'd')})"


def _shape(row: Row) -> str:
    gpus = row.get("gpus") or 1
    where = f", {gpus} GPUs, {row.get('strategy')}" if gpus != 1 else ""
    return f"B {row.get('B', UNKNOWN)} × T {row.get('T', UNKNOWN)}{where}"


def _step(row: Row) -> str:
    fastest, slowest = row.get("ms_fastest"), row.get("ms_slowest")
    spread = "" if fastest is None or slowest is None else f" ({cell(fastest, ',.1f')} … {cell(slowest, ',.1f')})"
    return cell(row.get("ms_per_step"), ",.1f") + spread


def _uboo(row: Row) -> str:
    uboo = row.get("uboo")
    return {True: "on", False: "off", None: UNKNOWN}.get(uboo, str(uboo))


def _how(row: Row) -> str:
    switches = {"cuda_graph": "CUDA graph", "compile": "compiled", "fp8": "FP8", "checkpointing": "checkpointing"}
    on = []
    for key, name in switches.items():
        value = row.get(key)
        if value and value not in ("none", "off"):
            on.append(name if value is True else f"{name}: {value}")
    return ", ".join([*(str(row[key]) for key in ("precision", "optimizer") if row.get(key)), *on]) or UNKNOWN


def _percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{100 * share:.1f} %"


def _peers(row: Row) -> str:
    peers = row.get("peers") or {}
    return ", ".join(f"{name} {cell(value, ',.0f')}" for name, value in peers.items() if isinstance(value, int | float)) or UNKNOWN


def added_memory(results: Results) -> tuple[str, str]:
    """UBÖO's share of the peak, for the summary: in words, and whether it is no more than was hoped for."""
    measured = results.of(TRAINING)
    off, on = uboo_rows(measured.rows) if measured else ({}, {})
    before, after = off.get("peak_gib"), on.get("peak_gib")
    if before is None or after is None:
        return UNKNOWN, UNKNOWN
    share, added = 100 * (after / before - 1), after - before
    answers = ["no" if missed else "yes" for missed in (round(share, 1) > HOPED_SHARE, added * 2**30 > HOPED_BYTES)]
    reached = answers[0] if len(set(answers)) == 1 else f"in percent {answers[0]}, in bytes {answers[1]}"
    return f"{change(before, after)} ({added:.2f} GiB)", reached
