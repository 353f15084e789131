"""The files that `predict` writes: a line a sequence, from each process a file of its own."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from mmrec.files import write_atomically

_NAME = re.compile(r"predictions(\.\d+)?\.jsonl")


def prediction_files(folder: Path, world_size: int) -> list[Path]:
    """The files of `world_size` processes, in the order of their ranks: `predictions.jsonl` of one, else `predictions.RANK.jsonl`."""
    if world_size == 1:
        return [folder / "predictions.jsonl"]
    return [folder / f"predictions.{rank}.jsonl" for rank in range(world_size)]


def write_predictions(folder: Path, batches: Iterable[Mapping[str, Tensor]], rank: int, world_size: int) -> Path:
    """Write one rank's lines, `{"index", "loss", "num_tokens"}`, whole or not at all.

    Rank 0 also removes what a call with another number of processes left: no other rank writes those names, so that the order in which
    the ranks come here is of no account.

    Args:
        folder: of the run.
        batches: `loss`, mean negative log-likelihoods in nats (B,), and `num_tokens`, what each is the mean of (B,); the ranks' sequences
            are those that rank, rank + W, rank + 2W, ... of the validation split name, in this order.
        rank, world_size: which of how many processes, W.

    Returns:
        The rank's file.
    """
    files = prediction_files(folder, world_size)
    rows = [row for batch in batches for row in zip(batch["loss"].tolist(), batch["num_tokens"].tolist(), strict=True)]
    lines = [
        json.dumps({"index": rank + world_size * place, "loss": loss, "num_tokens": count}) + "\n"
        for place, (loss, count) in enumerate(rows)
    ]
    write_atomically(files[rank], "".join(lines).encode())
    if rank == 0:
        for path in folder.glob("predictions*.jsonl"):
            if path not in files and _NAME.fullmatch(path.name):
                path.unlink(missing_ok=True)
    return files[rank]
