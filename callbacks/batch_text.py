"""The text of a batch that something was odd about, in a file of the run's folder, and where in the data it lies."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from callbacks.late_steps import GivenBatch
from mmrec.files import write_atomically

FOLDER = "batches"
MOST_FILES = 100  # of a rank and run: a run that went wrong for good must not fill the disk


def save_batches(trainer: Trainer, step: int, batches: Sequence[GivenBatch]) -> str:
    """Write a step's micro-batches of this rank to `<default_root_dir>/batches/step=NNNNNN-rank=R.jsonl`, a line a sequence.

    A line holds `micro_batch`, `row`, where it lies (`window`, `file` and `token`, its first one's place in that file) if the data have
    random access, and `text`, or `token_ids` where the data module has no tokenizer. Waits for the device.

    Returns:
        Words for a message: where the text is, or why it is nowhere.
    """
    folder = Path(trainer.default_root_dir) / FOLDER
    path = folder / f"step={step:06d}-rank={trainer.global_rank}.jsonl"
    if trainer.fast_dev_run or (not path.exists() and len(list(folder.glob(f"*-rank={trainer.global_rank}.jsonl"))) >= MOST_FILES):
        return "its text is not kept"
    lines = []
    for index, batch in enumerate(batches):
        places = _places(trainer, batch.number, len(batch.input_ids))
        for row, (ids, place) in enumerate(zip(batch.input_ids.tolist(), places, strict=True)):
            lines.append(json.dumps({"micro_batch": index, "row": row, **place, **_content(trainer, ids)}, ensure_ascii=False) + "\n")
    try:
        write_atomically(path, "".join(lines).encode())
    except OSError as error:  # a full disk ends no run
        return f"its text could not be written: {error}"
    return f"its text: {path}"


def _places(trainer: Trainer, number: int | None, rows: int) -> list[dict[str, Any]]:
    of_batch = getattr(getattr(trainer.train_dataloader, "dataset", None), "places", None)
    return [{}] * rows if number is None or of_batch is None else of_batch(number)


def _content(trainer: Trainer, ids: list[int]) -> dict[str, Any]:
    tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
    return {"token_ids": ids} if tokenizer is None else {"text": tokenizer.decode(ids)}
