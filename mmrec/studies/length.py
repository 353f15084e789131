"""Loss by position: what a network trained on short windows makes of books read in long ones, its state carried through each.

Two comparisons say whether the loss rises beyond the training's length T. `rise` is the loss at some positions minus that at T/2 … T of the
same windows; texts differ more than networks do, so its standard error is large. `over_restarted` is the loss minus that of the same
tokens when everything is forgotten every T tokens, over those with at least T/2 tokens before them even so: what the longer context itself
is worth, below 0 where it helps. Books are taken for independent, windows of one book are not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from mmrec.commandline.errors import BadInputError
from mmrec.measuring.machine import device, machine
from mmrec.studies.books import Book, Windows, windows_of
from mmrec.studies.runs import Row, Run
from mmrec.studies.statistics import clustered_mean
from mmrec.studies.training import fit

STUDY = "length"
BIN, FAR = "bin", "far"  # kinds of rows: stretches of positions that follow each other, and the last ones, which are judged
# What tells a row from all others.
IDENTITY = (
    "study", "model", "variant", "trained_on", "params_m", "tokens_m", "batch_tokens", "lr", "seed", "trained_length", "length", "what",
    "position_from", "gpu",
)  # fmt: skip
_TOKENS_TOGETHER = 1 << 16  # read in one call
_LOGITS_TOGETHER = 1 << 13  # tokens whose logits exist at a time
Losses = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Evaluation:
    """What a trained network reads.

    Attributes:
        books: all of them.
        lengths: of the windows, in tokens; each a multiple of the training's.
    """

    books: tuple[Book, ...]
    lengths: tuple[int, ...]


class Span(NamedTuple):
    """Positions from `start` to below `end`, of the kind `what`."""

    what: str
    start: int
    end: int


def trained_length(run: Run) -> int:
    """T, the tokens of a training window."""
    return int(run.content["data"]["init_args"]["seq_len"])


def check_length(length: int, trained: int) -> None:
    """Refuse a length whose windows cannot be compared with the training's.

    Raises:
        BadInputError: it is no multiple, or no longer.
    """
    if length % trained or length < 2 * trained:
        raise BadInputError(f"--lengths {length}: give twice the training's {trained:,} tokens, or a larger multiple of them")


def spans(trained: int, length: int) -> list[Span]:
    """Bins that double up to the training's length T (0 … T/8, T/4, T/2, T) and are T wide beyond it; and the stretch that is judged.

    That is from three quarters of the length on, rounded down to a whole T: the last quarter of 8T, the last half of 2T.
    """
    edges = [0, trained // 8, trained // 4, trained // 2, *range(trained, length + 1, trained)]
    bins = [Span(BIN, start, end) for start, end in pairwise(edges)]
    return [*bins, Span(FAR, max(1, 3 * length // (4 * trained)) * trained, length)]


def token_losses(network: Any, tokens: Tensor) -> Tensor:
    """Cross-entropy of every next token, (B, L) fp32 in nats, of windows (B, L + 1), each read from an empty state.

    Of the logits only a part exists at a time.
    """
    ids, labels = tokens[:, :-1], tokens[:, 1:]
    hidden, _ = network.hidden_states(ids)
    size = max(1, _LOGITS_TOGETHER // len(ids))
    losses = []
    for states, wanted in zip(hidden.split(size, dim=1), labels.split(size, dim=1), strict=True):
        logits = network.head(states).flatten(0, 1).float()
        losses.append(F.cross_entropy(logits, wanted.flatten(), reduction="none").view_as(wanted))
    return torch.cat(losses, dim=1)


def losses_of(network: Any, windows: Windows, restart: int | None = None) -> Losses:
    """The losses of all windows, (N, L).

    Args:
        network: on the current device.
        windows: of L tokens.
        restart: forget everything every so many tokens; None: only at the start of a window.
    """
    length = windows.tokens.shape[1] - 1
    piece = restart or length
    tokens = torch.from_numpy(windows.tokens).long()
    rows = tokens.unfold(1, piece + 1, piece).reshape(-1, piece + 1)  # a piece's label of its last token is the next one's first
    losses = [token_losses(network, batch.to(device())).cpu() for batch in rows.split(max(1, _TOKENS_TOGETHER // piece))]
    return torch.cat(losses).view(-1, length).numpy()


def summarised(losses: Losses, restarted: Losses, books: Sequence[str], trained: int) -> list[Row]:
    """Rows of all spans: means over windows, with standard errors over books.

    Args:
        losses: (N, L), each window read as a whole.
        restarted: the same tokens' with everything forgotten every `trained` tokens.
        books: N names.
        trained: the training's length.
    """
    length = losses.shape[1]
    reference = losses[:, trained // 2 : trained].mean(1)
    read_enough = np.arange(length) % trained >= trained // 2
    rows = []
    for what, start, end in spans(trained, length):
        here = losses[:, start:end].mean(1)
        loss, error = clustered_mean(here, books)
        rise, rise_error = clustered_mean(here - reference, books)
        row: Row = {"what": what, "position_from": start, "position_to": end, "loss": loss, "standard_error": error}
        row |= {"rise": rise, "rise_standard_error": rise_error, "over_restarted": None, "over_restarted_standard_error": None}
        if start >= trained:
            chosen = read_enough[start:end]
            apart = (losses - restarted)[:, start:end][:, chosen].mean(1)
            row["over_restarted"], row["over_restarted_standard_error"] = clustered_mean(apart, books)
        rows.append(row | {"windows": len(losses), "books": len(set(books))})
    return rows


def descriptions(run: Run, evaluation: Evaluation) -> list[Row]:
    """A row a length, of the columns that are known before the training."""
    return [run.description() | {"trained_length": trained_length(run), "length": length} for length in evaluation.lengths]


def measure(run: Run, evaluation: Evaluation) -> list[Row]:
    """Train a run, then read the books in windows of each length."""
    trained, short = fit(run), trained_length(run)
    common = {
        **trained.parameters(),
        **trained.validate(),
        "peak_gib": trained.peak_gib,
        "seconds": round(trained.seconds, 1),
    }
    rows = []
    with trained.evaluation() as network:
        for known in descriptions(run, evaluation):
            windows = windows_of(evaluation.books, known["length"])
            found = summarised(losses_of(network, windows), losses_of(network, windows, short), windows.books, short)
            rows += [known | common | row | machine(device()) for row in found]
    return rows
