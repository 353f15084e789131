"""The tables of section 1.2.1, UBÖO's convergence."""

import math
import statistics
from collections.abc import Callable, Sequence

from document_markdown import UNKNOWN, captioned, cell, change, markdown, measured_caption, owed_caption, table
from document_sources import STUDY, Measured, Results, Row, groups, values, with_values

ARMS = ("off", "mse", "normalized")
METRICS: tuple[tuple[str, str, str, Callable[[Row], float | None]], ...] = (
    ("Steps to the baseline's final loss", "−20 … −30 %", ",.0f", lambda row: row.get("steps_to_baseline")),
    ("Final perplexity", "−3 … −5 %", ".3f", lambda row: None if row.get("val_loss") is None else math.exp(row["val_loss"])),
    ("Variance of the training loss, detrended", "−40 … −50 %", ".5f", lambda row: row.get("loss_variance")),
    ("Peak memory, GiB", "+8 … +10 %", ".2f", lambda row: row.get("peak_gib")),
)
# What is seen of the auxiliary gradient and of the target at the end of a run, with the rows' names and forms.
DIAGNOSES = {
    "angle to the main gradient, cosine": ("grad_cosine", "+.2f"),
    "its norm, of the main one's": ("grad_norm_ratio", ".1e"),
    "variance of the target": ("target_variance", ".1e"),
    "peak GiB": ("peak_gib", ".2f"),
}


def mean_of(rows: Sequence[Row], value: Callable[[Row], float | None]) -> float | None:
    """Mean over seeds; None where no seed has it."""
    found = [number for number in map(value, rows) if number is not None]
    return statistics.fmean(found) if found else None


def over_seeds(rows: Sequence[Row], value: Callable[[Row], float | None], form: str) -> str:
    """Mean and range over seeds."""
    found = [number for number in map(value, rows) if number is not None]
    if not found:
        return UNKNOWN
    spread = f" ({format(min(found), form)} … {format(max(found), form)})" if len(found) > 1 else ""
    return format(statistics.fmean(found), form) + spread


def owed_studies(rows: Sequence[Row]) -> str:
    """Which of the studies that have a table have no row."""
    return ", ".join(f"`--study {name}`" for name in ("protocol", "uboo", "finalist") if not any(with_values(rows, study=name)))


@table
def uboo_convergence(results: Results) -> str:
    """§1.2.1: the founding document's protocol."""
    measured, rows = _study(results, "protocol")

    def body(rows: Sequence[Row]) -> str:
        arms = {arm: list(with_values(rows, uboo=arm)) for arm in ARMS}
        lines = []
        for title, predicted, form, value in METRICS:
            off, mse, normalized = (mean_of(arms[arm], value) for arm in ARMS)
            cells = [over_seeds(arms[arm], value, form) for arm in ARMS]
            lines.append([title, *cells, predicted, change(off, mse), change(off, normalized)])
        titles = ("metric", "UBÖO off", "UBÖO `mse`", "UBÖO `normalized`", "predicted", "measured: `mse`", "measured: `normalized`")
        return markdown(titles, lines)

    if measured is None:
        return captioned(body([]), owed_caption(STUDY, _command("protocol")))
    parts = []
    for (parameters, steps, tokens), found in groups(rows, lambda row: tuple(row.get(key) for key in ("params_m", "steps", "tokens_m"))):
        seeds = len({row.get("seed") for row in found})
        deviation = (
            f"{cell(parameters, ',.0f')} M parameters instead of 7B, books instead of C4, {cell(steps, ',d')} steps, "
            f"{cell(tokens, ',.0f')} M tokens, {seeds} seeds: means and ranges"
        )
        parts.append(captioned(body(found), f"{deviation}. {measured_caption(measured, found, STUDY.command, stands_in=True)}"))
    return "\n\n".join(parts)


def _study(results: Results, name: str) -> tuple[Measured | None, list[Row]]:
    """The rows of one of the studies, and the file they are from; None where there is no such row."""
    measured = results.of(STUDY)
    rows = list(with_values(measured.rows, study=name)) if measured else []
    return (measured if rows else None), rows


def _command(study: str) -> str:
    return f"{STUDY.command} --study {study} --tokens-dir tokens/books"


def _setting(rows: Sequence[Row]) -> str:
    """Of what size, how long and from which seeds a study's rows are."""
    forms = {"params_m": (",.0f", "M parameters"), "tokens_m": (",.0f", "M tokens"), "lr": ("g", "learning rate"), "seed": ("d", "seeds")}
    parts = []
    for key, (form, what) in forms.items():
        numbers = ", ".join(dict.fromkeys(format(value, form) for value in sorted(values(rows, key))))
        parts.append(f"{numbers} {what}" if what.startswith("M ") else f"{what} {numbers}")
    return "; ".join(parts)


@table
def uboo_variants(results: Results) -> str:
    """§1.2.1: one factor at a time."""
    measured, rows = _study(results, "uboo")
    if measured is None:
        return captioned("", owed_caption(STUDY, _command("uboo")))
    off = mean_of([row for row in rows if row.get("uboo") == "off"], lambda row: row.get("val_loss"))
    arms = []
    for (uboo, variant, orthogonalize, lambda_p), found in groups(
        rows, lambda row: tuple(row.get(key) for key in ("uboo", "variant", "orthogonalize", "lambda_P"))
    ):
        loss = mean_of(found, lambda row: row.get("val_loss"))
        apart = UNKNOWN if loss is None or off is None else f"{loss - off:+.4f}"
        settings = [str(value if value is not None else UNKNOWN) for value in (variant, uboo, orthogonalize, lambda_p)]
        seen = [cell(mean_of(found, lambda row, key=key: row.get(key)), form) for key, form in DIAGNOSES.values()]
        losses = [over_seeds(found, lambda row, key=key: row.get(key), ".4f") for key in ("val_loss", "val_loss_c4")]
        arms.append((math.inf if loss is None else loss, [*settings, losses[0], apart, losses[1], *seen]))
    titles = ("variant", "UBÖO", "orthogonalize", "λ_P", "validation loss, nats", "against off", "on C4", *DIAGNOSES)
    lines = [line for _, line in sorted(arms, key=lambda arm: arm[0])]
    noise = "Two seeds of one network differ by some 0.01: less than 0.02 between single runs says nothing."
    return captioned(markdown(titles, lines), f"{_setting(rows)}. {noise} {measured_caption(measured, rows, _command('uboo'))}")


@table
def finalists(results: Results) -> str:
    """§1.2.1: the network against others of equal size."""
    measured, rows = _study(results, "finalist")
    if measured is None:
        return captioned("", owed_caption(STUDY, _command("finalist")))
    lines = []
    for (model, variant, parameters, tokens), found in groups(
        rows, lambda row: tuple(row.get(key) for key in ("model", "variant", "params_m", "tokens_m"))
    ):
        losses = [over_seeds(found, lambda row, key=key: row.get(key), ".4f") for key in ("val_loss", "val_loss_c4")]
        sizes = [cell(parameters, ",.1f"), cell(tokens, ",.0f"), str(len(found))]
        lines.append([f"{model}{f', {variant}' if variant else ''}", *sizes, *losses])
    titles = ("network", "M parameters", "M tokens", "seeds", "validation loss, nats", "on C4")
    return captioned(markdown(titles, lines), measured_caption(measured, rows, _command("finalist")))
