"""The parallel part of `prepare`: chunks of lines in, tokens out, in the order of the lines whatever the number of processes."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from datamodules.documents import is_validation, parse_line, read_lines
from datamodules.tokenizer import Tokenizer, load_tokenizer

_CHUNK_LINES = 256
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Chunk:
    """Lines of one file, the first of them number `first_line` (0-based); `position` is how far into the file (bytes) they reach."""

    file: int
    first_line: int
    lines: list[bytes]
    position: int


@dataclass(frozen=True)
class TokenisedChunk:
    """`tokens` of all documents of a chunk, each with its end-of-document token; `lengths` a line (0: skipped or of the other split)."""

    chunk: Chunk
    tokens: npt.NDArray[np.uint32]
    lengths: list[int]
    reasons: list[str | None]


@dataclass(frozen=True)
class Split:
    """Which documents to keep: all (`fraction` 0), or those that the hash puts on one side."""

    fraction: float = 0.0
    validation: bool = False

    def holds(self, text: str) -> bool:
        return self.fraction <= 0.0 or is_validation(text, self.fraction) == self.validation


def read_chunks(files: list[str], file: int = 0, line: int = 0) -> Iterator[Chunk]:
    """Chunks of all lines of `files` from line `line` (0-based) of file number `file` on."""
    position = 0

    def at(offset: int) -> None:
        nonlocal position
        position = offset

    for number in range(file, len(files)):
        first = line if number == file else 0
        lines: list[bytes] = []
        size = 0
        for content in read_lines(files[number], first, at):
            lines.append(content)
            size += len(content)
            if len(lines) == _CHUNK_LINES or size >= _CHUNK_BYTES:
                yield Chunk(number, first, lines, position)
                first, lines, size = first + len(lines), [], 0
        if lines:
            yield Chunk(number, first, lines, position)


def tokenise(chunk: Chunk, tokenizer: Tokenizer, split: Split) -> TokenisedChunk:
    """Parse and encode one chunk."""
    texts: list[str] = []
    kept: list[bool] = []
    reasons: list[str | None] = []
    for line in chunk.lines:
        text, reason = parse_line(line)
        keep = text is not None and split.holds(text)
        if keep and text is not None:
            texts.append(text)
        kept.append(keep)
        reasons.append(reason)
    encoded = iter(tokenizer.encode_batch(texts))
    documents = [[*next(encoded), tokenizer.eod_id] if keep else [] for keep in kept]
    tokens = np.concatenate([np.asarray(document, dtype=np.uint32) for document in documents]) if documents else np.empty(0, np.uint32)
    return TokenisedChunk(chunk, tokens, [len(document) for document in documents], reasons)


def tokenise_chunks(chunks: Iterable[Chunk], tokenizer_path: str, split: Split, workers: int) -> Iterator[TokenisedChunk]:
    """Tokenise chunks in `workers` processes (0 or 1: in this one), results in the order of the chunks, a bounded number in flight."""
    if workers <= 1:
        tokenizer = load_tokenizer(tokenizer_path)
        for chunk in chunks:
            yield tokenise(chunk, tokenizer, split)
        return
    context = multiprocessing.get_context("fork")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(tokenizer_path, split, os.getpid()))
    waiting: deque[Future[TokenisedChunk]] = deque()
    try:
        for chunk in chunks:
            waiting.append(executor.submit(_in_worker, chunk))
            if len(waiting) >= 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


_worker: dict[str, Any] = {}


def _start_worker(tokenizer_path: str, split: Split, parent: int) -> None:
    # The processes are the parallelism; threads inside each of them would only fight for the same cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker["tokenizer"], _worker["split"] = load_tokenizer(tokenizer_path), split
    threading.Thread(target=_end_with_parent, args=(parent, os._exit), daemon=True).start()


def _end_with_parent(parent: int, end: Callable[[int], Any]) -> None:
    """A parent killed with -9 cannot close its pool: without this its workers would wait for ever."""
    while os.getppid() == parent:
        time.sleep(1.0)
    end(1)


def _in_worker(chunk: Chunk) -> TokenisedChunk:
    return tokenise(chunk, _worker["tokenizer"], _worker["split"])
