"""The tables of section 1.2.1, UBÖO's convergence."""

import math
import statistics
from collections.abc import Callable, Sequence

from document_markdown import UNKNOWN, captioned, cell, change, markdown, measured_caption, owed_caption, table
from document_sources import STUDY, Measured, Results, Row, groups, values, with_values

from mmrec.studies.plan import studies

ARMS = ("off", "mse", "normalized")
_PROTOCOL = studies()["protocol"]
SEEDS = len(_PROTOCOL.seeds)
PROTOCOL_TOKENS = _PROTOCOL.batch[0] * 2048  # a step; what has more is its form at the batch of 128
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


def paired_by_seed(off: Sequence[Row], arm: Sequence[Row], value: Callable[[Row], float | None]) -> list[tuple[float, float]]:
    """What both have, without and with, a pair a seed; a seed that one of them lacks would compare seeds instead of arms."""
    without = {row.get("seed"): value(row) for row in off}
    pairs = ((without.get(row.get("seed")), value(row)) for row in arm)
    return [(before, after) for before, after in pairs if before is not None and after is not None]


def means_of_both(off: Sequence[Row], arm: Sequence[Row], value: Callable[[Row], float | None]) -> tuple[float, float] | tuple[None, None]:
    """Means without and with, over the seeds that both have."""
    pairs = paired_by_seed(off, arm, value)
    if not pairs:
        return None, None
    before, after = zip(*pairs, strict=True)
    return statistics.fmean(before), statistics.fmean(after)


def counted(rows: Sequence[Row]) -> list[Row]:
    """The rows, a run that never reached what the baseline ends at with all its steps: to leave it out would favour its arm."""
    if not any(values(rows, "steps_to_baseline")):
        return list(rows)
    return [
        row | {"steps_to_baseline": row.get("steps")} if row.get("steps_to_baseline") is None and _loss(row) is not None else row
        for row in rows
    ]


def over_seeds(rows: Sequence[Row], value: Callable[[Row], float | None], form: str) -> str:
    """Mean and range over seeds."""
    return mean_and_range([number for number in map(value, rows) if number is not None], form)


def mean_and_range(found: Sequence[float], form: str) -> str:
    """Of some numbers; unknown of none."""
    if not found:
        return UNKNOWN
    spread = f" ({format(min(found), form)} … {format(max(found), form)})" if len(found) > 1 else ""
    return format(statistics.fmean(found), form) + spread


def owed_studies(rows: Sequence[Row]) -> str:
    """Which of the studies that have a table have no row, and which arms of the protocol have not all their seeds."""
    owed = [f"`--study {name}`" for name in ("protocol", "uboo", "finalist") if not any(with_values(rows, study=name))]
    for _, found in groups(with_values(rows, study="protocol"), _protocol):
        few = {arm: len(list(with_values(found, uboo=arm))) for arm in ARMS}
        seeds = ", ".join(f"{arm} {number}" for arm, number in few.items() if number < SEEDS)
        owed += [f"`--study {_protocol_study(found)}`: {seeds} of {SEEDS} seeds"] if seeds else []
    protocol = list(with_values(rows, study="protocol"))
    if protocol and _protocol_study(protocol) == "protocol":
        owed.append("`--study protocol_128`")
    return "; ".join(owed)


def _protocol(row: Row) -> tuple[object, ...]:
    return tuple(row.get(key) for key in ("params_m", "steps", "tokens_m"))


def _protocol_study(rows: Sequence[Row]) -> str:
    """What `train_uboo_test` calls the protocol in the form that some rows are of."""
    return "protocol_128" if any((row.get("batch_tokens") or 0) > PROTOCOL_TOKENS for row in rows) else "protocol"


@table
def uboo_convergence(results: Results) -> str:
    """§1.2.1: the founding document's protocol."""
    measured, rows = _study(results, "protocol")

    def body(rows: Sequence[Row]) -> str:
        arms = {arm: list(with_values(counted(rows), uboo=arm)) for arm in ARMS}
        lines = []
        for title, predicted, form, value in METRICS:
            cells = [over_seeds(arms[arm], value, form) for arm in ARMS]
            changes = [change(*means_of_both(arms["off"], arms[arm], value)) for arm in ARMS[1:]]
            lines.append([title, *cells, predicted, *changes])
        titles = ("metric", "UBÖO off", "UBÖO `mse`", "UBÖO `normalized`", "predicted", "measured: `mse`", "measured: `normalized`")
        return markdown(titles, lines)

    if measured is None:
        return captioned(body([]), owed_caption(STUDY, _command("protocol")))
    parts = []
    for (parameters, steps, tokens), found in groups(rows, _protocol):
        seeds = ", ".join(f"{arm} {len(list(with_values(found, uboo=arm)))}" for arm in ARMS)
        deviation = (
            f"{cell(parameters, ',.0f')} M parameters instead of 7B, books instead of C4, {cell(steps, ',d')} steps, "
            f"{cell(tokens, ',.0f')} M tokens; seeds: {seeds}; means and ranges; changes over the seeds that both have. "
            "What is to be reached is the mean of what off's seeds end at; a run that never does counts with all its steps"
        )
        command = _command(_protocol_study(found))
        parts.append(captioned(body(found), f"{deviation}. {measured_caption(measured, found, command, stands_in=True)}"))
    return "\n\n".join(parts)


def _loss(row: Row) -> float | None:
    loss: float | None = row.get("val_loss")
    return loss


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
    off = list(with_values(rows, uboo="off"))
    arms = []
    for (uboo, variant, orthogonalize, lambda_p), found in groups(
        rows, lambda row: tuple(row.get(key) for key in ("uboo", "variant", "orthogonalize", "lambda_P"))
    ):
        apart = [after - before for before, after in paired_by_seed(off, found, _loss)]
        settings = [str(value if value is not None else UNKNOWN) for value in (variant, uboo, orthogonalize, lambda_p)]
        settings.append(str(len(found)))
        seen = [cell(mean_of(found, lambda row, key=key: row.get(key)), form) for key, form in DIAGNOSES.values()]
        losses = [over_seeds(found, lambda row, key=key: row.get(key), ".4f") for key in ("val_loss", "val_loss_c4")]
        order = statistics.fmean(apart) if apart else math.inf
        arms.append((order, [*settings, losses[0], UNKNOWN if uboo == "off" else mean_and_range(apart, "+.4f"), losses[1], *seen]))
    titles = ("variant", "UBÖO", "orthogonalize", "λ_P", "seeds", "validation loss, nats", "against off, by seed", "on C4", *DIAGNOSES)
    lines = [line for _, line in sorted(arms, key=lambda arm: arm[0])]
    losses_off = [loss for loss in map(_loss, off) if loss is not None]
    spread = max(losses_off) - min(losses_off) if len(losses_off) > 1 else None
    noise = "" if spread is None else f" Off's own seeds lie {spread:.3f} nats apart: single seeds say nothing below that."
    return captioned(markdown(titles, lines), f"{_setting(rows)}.{noise} {measured_caption(measured, rows, _command('uboo'))}")


@table
def finalists(results: Results) -> str:
    """§1.2.1: the network against others of equal size."""
    measured, rows = _study(results, "finalist")
    if measured is None:
        return captioned("", owed_caption(STUDY, _command("finalist")))
    lines = []
    for (model, variant, parameters, tokens, rate), found in groups(
        rows, lambda row: tuple(row.get(key) for key in ("model", "variant", "params_m", "tokens_m", "lr"))
    ):
        losses = [over_seeds(found, lambda row, key=key: row.get(key), ".4f") for key in ("val_loss", "val_loss_c4")]
        sizes = [cell(parameters, ",.1f"), cell(tokens, ",.0f"), str(len(found))]
        loss = mean_of(found, _loss)
        beside = mean_of([row for row in rows if row.get("model") == "transformer++" and row.get("tokens_m") == tokens], _loss)
        apart = UNKNOWN if loss is None or beside is None or model == "transformer++" else f"{loss - beside:+.4f}"
        lines.append([f"{model}{f', {variant}' if variant else ''}", *sizes, cell(rate, "g"), losses[0], apart, losses[1]])
    titles = ("network", "M parameters", "M tokens", "seeds", "learning rate", "validation loss, nats", "against the Transformer", "on C4")
    return captioned(markdown(titles, lines), "Means and ranges over seeds. " + measured_caption(measured, rows, _command("finalist")))
