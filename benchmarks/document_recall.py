"""The tables of section 1.2.1 on what the state is worth: recall against its bytes, and loss by position beyond the training's length."""

from document_markdown import UNKNOWN, captioned, cell, markdown, measured_caption, owed_caption, table
from document_sources import LENGTH, RECALL, Measured, Results, Source, is_cpu
from document_study import over_seeds

from mmrec.studies import length_report, recall_report
from mmrec.studies.length import BIN, FAR
from mmrec.studies.recall_report import Best


def _on_gpu(results: Results, source: Source) -> Measured | None:
    """The file that is shown, without what was tried on a CPU."""
    measured = results.of(source)
    return measured and measured._replace(rows=[row for row in measured.rows if not is_cpu(row)])


@table
def recall(results: Results) -> str:
    """A line a network at its best learning rate, and the smallest states that recall almost everything."""
    measured = _on_gpu(results, RECALL)
    if measured is None:
        return captioned("", owed_caption(RECALL))
    parts = []
    for title, rows in recall_report.tasks(measured.rows).items():
        networks = recall_report.best(rows)
        titles = ("model", "variant", "D", "heads", "bytes of state", "recalled, %", "M parameters", "learning rate", "seeds")
        smallest = "; ".join(recall_report.smallest_states(networks))
        body = markdown(titles, [_recalled(network) for network in networks], words=(0, 1))
        parts.append(f"{title}:\n\n" + captioned(body, f"{smallest}. {measured_caption(measured, rows, RECALL.command)}"))
    return "\n\n".join(parts)


def _recalled(network: Best) -> list[str]:
    row = network.rows[0]
    return [
        row["model"], row["variant"] or UNKNOWN, cell(row["model_dim"], "d"), cell(row["num_heads"], "d"), cell(network.state_bytes, ",d"),
        over_seeds(network.rows, lambda seed: 100 * seed["accuracy"], ".2f"), cell(row["params_m"], "g"), cell(row["lr"], "g"),
        cell(len(network.rows), "d"),
    ]  # fmt: skip


@table
def length(results: Results) -> str:
    """A line a span of positions, and whether the loss rises behind the training's length."""
    measured = _on_gpu(results, LENGTH)
    if measured is None:
        return captioned("", owed_caption(LENGTH))
    parts = []
    for title, rows in length_report.networks(measured.rows).items():
        titles = ("positions", "loss, nats", "against the end of a training window", "against everything forgotten at each window's end")
        body = markdown(titles, [[text.replace("-", "−") for text in length_report.cells(row)] for row in rows if row["what"] == BIN])
        judged = [length_report.verdict(row).replace("(-", "(−") for row in rows if row["what"] == FAR]
        parts.append(f"{title}:\n\n" + captioned(body, *(f"{verdict[0].upper()}{verdict[1:]}." for verdict in judged)))
    return "\n\n".join([*parts, captioned("", measured_caption(measured, measured.rows, LENGTH.command))])
