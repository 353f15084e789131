"""The validation split of a text source: its first documents, tokenised once and kept in memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np

from datamodules.documents import LineCounts, is_validation
from datamodules.packing import ArrayWindows, StreamOptions
from datamodules.text_source import TextShards
from datamodules.tokenizer import Tokenizer

_logger = logging.getLogger(__name__)
_ENCODE_TOGETHER = 256


def validation_windows(
    shards: TextShards, tokenizer: Tokenizer, options: StreamOptions, name: str, *, max_windows: int | None, hashed: bool
) -> ArrayWindows:
    """Read documents until `max_windows` windows are full (None: all of them).

    Args:
        shards: validation files, or with `hashed` the training files, of which the documents are taken that training leaves out.
        name: for messages.

    Raises:
        ValueError: too few tokens for one window, or too many bad lines.
    """
    wanted = None if max_windows is None else max_windows * options.seq_len + 1
    counts, arrays, total = LineCounts(), [], 0
    texts: list[str] = []

    def encode() -> int:
        ids = [token for document in tokenizer.encode_batch(texts) for token in (*document, tokenizer.eod_id)]
        texts.clear()
        arrays.append(np.asarray(ids, dtype=np.int64))
        return len(ids)

    for text in _texts(shards, counts, options, hashed=hashed):
        texts.append(text)
        if len(texts) == _ENCODE_TOGETHER or (wanted is not None and sum(map(len, texts)) >= wanted - total):
            total += encode()
            if wanted is not None and total >= wanted:
                break
    else:
        total += encode()
        counts.require_share(options.max_bad_line_share, final=True)
    if counts.skipped:
        _logger.warning("validation %s: %s", name, counts.summary())
    tokens = np.concatenate(arrays)[:wanted]
    if len(tokens) <= options.seq_len:
        share = "; raise data.validation_fraction or give data.validation_files" if hashed else "; give more text or lower data.seq_len"
        raise ValueError(f"{name}: {len(tokens):,} validation tokens are too few for one window of seq_len={options.seq_len}{share}")
    return ArrayWindows(tokens, options.seq_len, tokenizer.eod_id, options.reset_at_documents)


def _texts(shards: TextShards, counts: LineCounts, options: StreamOptions, *, hashed: bool) -> Iterator[str]:
    for shard in range(shards.num_shards):
        for number, (text, reason) in shards.read(shard, 0, 1, 0):
            counts.add(reason, f"{shards.name(shard)}:{number + 1}")
            if reason is not None:
                counts.require_share(options.max_bad_line_share, final=False)
            if text is not None and (not hashed or is_validation(text, options.validation_fraction)):
                yield text
