"""Writes one split's tokens to shards of a fixed size, and can go on after a kill at any moment with the same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from datamodules.documents import LineCounts
from datamodules.tokenise import TokenisedChunk
from datamodules.tokens import DTYPES
from mmrec.files import write_atomically


class ShardWriter:
    """Tokens of one split to `<split>-00000.bin`, ...

    `state` is what has safely reached the disk: the finished shards, and as a cursor the line (and the number of that document's tokens
    already written: a document may be longer than a shard) where the next shard begins. It is handed to `on_shard` after each shard.

    Args:
        folder, split: where to write.
        dtype: `uint16` or `uint32`.
        shard_tokens: tokens a shard; the last one has the rest.
        files: names for messages, one an input file.
        state: a former `state` to go on from, or None.
        on_shard: called after each finished shard, to record `state`.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: str,
        shard_tokens: int,
        files: list[str],
        state: dict[str, Any] | None,
        on_shard: Callable[[dict[str, Any]], None],
    ) -> None:
        self._folder, self._split, self._dtype, self._shard_tokens, self._files = folder, split, dtype, shard_tokens, files
        self._on_shard = on_shard
        self.state = state or {"shards": [], "cursor": {"file": 0, "line": 0, "offset": 0}, "documents": 0, "lines": LineCounts().as_dict()}
        self.counts = LineCounts(**self.state["lines"])
        self.documents = int(self.state["documents"])
        self._skip_tokens = int(self.state["cursor"]["offset"])
        self._pending: list[npt.NDArray[np.uint32]] = []
        self._num_pending = 0

    @property
    def cursor(self) -> tuple[int, int]:
        """File number and line (0-based) to read from."""
        return self.state["cursor"]["file"], self.state["cursor"]["line"]

    @property
    def tokens(self) -> int:
        """Tokens taken so far, those not yet written included."""
        return sum(shard["tokens"] for shard in self.state["shards"]) + self._num_pending

    def add(self, result: TokenisedChunk) -> None:
        """Take a chunk's documents, line by line."""
        start, chunk = 0, result.chunk
        for index, (length, reason) in enumerate(zip(result.lengths, result.reasons, strict=True)):
            line = chunk.first_line + index
            document = result.tokens[start : start + length]
            start += length
            taken = 0
            if self._skip_tokens:
                taken, self._skip_tokens = self._skip_tokens, 0
            while taken < length:
                room = self._shard_tokens - self._num_pending
                piece = document[taken : taken + room]
                self._pending.append(piece)
                self._num_pending += len(piece)
                taken += len(piece)
                if self._num_pending == self._shard_tokens:
                    if taken == length:  # the document is complete: the next shard begins with the next line
                        self._count(reason, chunk.file, line, length)
                        self._finish_shard(chunk.file, line + 1, 0)
                    else:
                        self._finish_shard(chunk.file, line, taken)
                elif taken == length:
                    self._count(reason, chunk.file, line, length)
            if length == 0:
                self._count(reason, chunk.file, line, length)

    def close(self) -> dict[str, Any]:
        """Write the last shard and return the split's entry of the manifest."""
        if self._num_pending:
            self._finish_shard(len(self._files), 0, 0)
        return {
            "shards": self.state["shards"],
            "documents": self.documents,
            "tokens": self.tokens,
            "lines": self.counts.as_dict(),
        }

    def _count(self, reason: str | None, file: int, line: int, length: int) -> None:
        self.counts.add(reason, f"{self._files[file]}:{line + 1}")
        self.documents += length > 0

    def _finish_shard(self, file: int, line: int, offset: int) -> None:
        tokens = np.concatenate(self._pending)
        content = tokens.astype(DTYPES[self._dtype]).tobytes()
        name = f"{self._split}-{len(self.state['shards']):05d}.bin"
        write_atomically(self._folder / name, content)
        entry = {"file": name, "tokens": len(tokens), "max_id": int(tokens.max()), "sha256": hashlib.sha256(content).hexdigest()}
        self._pending, self._num_pending = [], 0
        self.state = {
            "shards": [*self.state["shards"], entry],
            "cursor": {"file": file, "line": line, "offset": offset},
            "documents": self.documents,
            "lines": self.counts.as_dict(),
        }
        self._on_shard(self.state)
