"""What is measured and what is owed, at the top; and section 5: what was hoped for beside what was measured, and the steps."""

from collections.abc import Iterator

from document_hem import HOPED_LATENCY, LAYERS, PREDICTED_LATENCY, PREDICTED_MB, settings_of, three_forms
from document_markdown import UNKNOWN, captioned, change, change_of_times, markdown, owed_caption, table
from document_sources import (
    DECODING,
    HEM,
    LENGTH,
    NETWORK,
    OPERATORS,
    RECALL,
    SOURCES,
    STUDY,
    TRAINING,
    Measured,
    Results,
    Row,
    Source,
    values,
    with_values,
)  # fmt: skip
from document_study import ARMS, METRICS, counted, means_of_both, owed_studies
from document_training import UBOO_7B, added_memory, owed_cases, uboo_rows

# By metric of the study: what it is called, and the nearer end of what is hoped for, in percent.
UBOO_HOPED = (("steps to the baseline's final loss", -20), ("final perplexity", -3), ("variance of the loss", -40))
NOT_WRITTEN = "not written yet"


def _place(measured: Measured) -> str:
    return f"{', '.join(map(str, values(measured.rows, 'gpu')))}, {measured.date}"


def _owed(source: Source) -> str:
    return "" if source.has_script() else f" (its script is {NOT_WRITTEN})"


@table
def state(results: Results) -> str:
    """What is measured, what is owed."""
    found = {source: results.of(source) for source in SOURCES}

    def line(section: str, source: Source, owed: str = "") -> list[str]:
        measured = found[source]
        if measured is None:
            return [section, UNKNOWN, f"all of it{_owed(source)}"]
        return [section, _place(measured), owed or UNKNOWN]

    hem, training, study = found[HEM], found[TRAINING], found[STUDY]
    lines = [
        line("1.1 HEM", HEM, "; ".join(_hem_owed(hem.rows)) if hem else ""),
        line("1.2.1 UBÖO, convergence", STUDY, owed_studies(study.rows) if study else ""),
        line("1.2.1 Recall", RECALL),
        line("1.2.1 Long texts", LENGTH),
    ]
    planning = training is not None and all(uboo_rows(training.rows))
    lines.append(["1.2.2 UBÖO, memory", _place(training) if training and planning else UNKNOWN, UNKNOWN if planning else f"`{UBOO_7B[0]}`"])
    cases = owed_cases(training).removeprefix("Not measured yet: ").partition(": ")[0] if training else ""
    lines += [
        line("4.1 The network as it is", NETWORK),
        line("4.5 Training steps", TRAINING, cases),
        line("4.6 Decoding and long prompts", DECODING),
        line("4.7 Operators", OPERATORS),
    ]
    return markdown(("section", "measured on", "owed"), lines, words=range(3))


def _hem_owed(rows: list[Row]) -> Iterator[str]:
    if not any(row.get("what") == f"forward_{LAYERS}" for row in rows):
        yield f"the forward of {LAYERS} layers"
    if not any(row.get("bytes_ncu") for row in rows):
        yield "bytes counted by ncu"


@table
def hoped_and_measured(results: Results) -> str:
    """§5.2: every expectation of the founding document beside its measurement."""
    hem, study = results.of(HEM), results.of(STUDY)
    lines = []
    for setting, rows in settings_of(hem.rows) if hem else [((None,) * 6, [])]:
        lines += _hem_lines(rows, "HEM" if setting[3] is None else f"HEM, {setting[3]} heads")
    lines.append(["HEM: achieved memory bandwidth", "+40 … +50 %", UNKNOWN, UNKNOWN])
    protocol = list(with_values(study.rows, study="protocol")) if study else []
    longest = max((row.get("steps") or 0 for row in protocol), default=0)
    protocol = counted([row for row in protocol if (row.get("steps") or 0) == longest])
    arms = {arm: list(with_values(protocol, uboo=arm)) for arm in ARMS}
    for title, metric, limit in (
        ("steps to the baseline's final loss", 0, -20),
        ("final perplexity", 1, -3),
        ("variance of the loss", 2, -40),
    ):
        value = METRICS[metric][3]
        told, verdicts = [], []
        for arm in ARMS[1:]:
            before, after = means_of_both(arms["off"], arms[arm], value)
            if before is not None:
                told.append(f"`{arm}` {change(before, after)}")
                verdicts.append(f"`{arm}` {_reached(_points(before, after), limit)}")
        lines.append([f"UBÖO: {title}", METRICS[metric][1], ", ".join(told) or UNKNOWN, ", ".join(verdicts) or UNKNOWN])
    lines.append(["UBÖO: peak memory of forward and backward at 7B", "+8 … +10 % (1.5 … 2 GB)", *added_memory(results)])
    missing = [captioned("", owed_caption(source)) for source, found in ((HEM, hem), (STUDY, study)) if found is None]
    body = markdown(("expectation", "hoped for", "measured", "reached"), lines, words=(0, 3))
    machines = captioned("", f"HEM: {hem.rows[0].get('gpu')}, {hem.date}; each with its conditions in section 1.") if hem else ""
    return "\n\n".join(part for part in (body, machines, *missing) if part)


def _reached(points: float | None, limit: float) -> str:
    """Whether a change in percent is at most `limit`."""
    return UNKNOWN if points is None else "yes" if round(points, 1) <= limit else "no"


def _points(before: float | None, after: float | None) -> float | None:
    return None if not before or after is None else 100 * (after / before - 1)


def _hem_lines(rows: list[Row], name: str) -> list[list[str]]:
    off, fused_rest, on = three_forms(rows, "block", "fwd")
    without_outputs = [None if row.get("bytes_weights") is None else row["bytes_weights"] + row["bytes_inputs"] for row in (off, on)]
    launches, founding = (off.get("launches"), on.get("launches")), change(*PREDICTED_MB["total"])
    latency = _reached(_points(off.get("ms"), on.get("ms")), HOPED_LATENCY)
    return [
        [f"{name}: one block's latency, all of it against eager code", PREDICTED_LATENCY, change_of_times(off, on), latency],
        [f"{name}: … of it the one projection alone, the rest being fused either way", UNKNOWN, change_of_times(fused_rest, on), UNKNOWN],
        [f"{name}: launches of the projections", "about −80 %", change(*launches), _reached(_points(*launches), -80)],
        [
            f"{name}: bytes of weights and inputs, by arithmetic", f"about −50 % ({founding})", change(*without_outputs),
            _reached(_points(*without_outputs), -50),
        ],
        [f"{name}: bytes with the outputs, by arithmetic", UNKNOWN, change(off.get("bytes"), on.get("bytes")), UNKNOWN],
        [f"{name}: bytes, counted by ncu", UNKNOWN, change(off.get("bytes_ncu"), on.get("bytes_ncu")), UNKNOWN],
    ]  # fmt: skip


@table
def steps(results: Results) -> str:
    """§5.4."""
    study = "" if STUDY.has_script() else f" ({NOT_WRITTEN})"
    lines = (
        "`python -m mmrec.cli doctor --config NAME`: is the machine fit?",
        "`python -m mmrec.scripts.real_benchmark`: the network as it is.",
        "`python -m mmrec.scripts.benchmark_hem`: HEM off and on.",
        f"`{STUDY.command}`{study}: UBÖO off and on, as section 4.3 says.",
        "`make docs`.",
    )
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))
