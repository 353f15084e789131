"""Packed sequences: documents, each closed by its end-of-document token, laid end to end and cut into windows of `seq_len`."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import IterableDataset, get_worker_info

from datamodules.documents import LineCounts
from datamodules.text_source import Block, Cursor, DocumentStream, TextShards
from datamodules.tokenizer import Tokenizer, load_tokenizer
from datamodules.tokens import cut
from datamodules.windows import Batch, to_tensors

_ENCODE_TOGETHER = 32


@dataclass(frozen=True)
class StreamOptions:
    """What a packed stream depends on beside its shards; see `DocumentStream` and `C4DataModule`."""

    seq_len: int
    batch_size: int
    seed: int
    shuffle: bool
    shuffle_block: int
    validation_fraction: float
    max_bad_line_share: float
    reset_at_documents: bool


class PackedBatches(IterableDataset[Batch]):
    """Endless training batches from text, tokenised on the way.

    Args:
        shards: where records come from.
        tokenizer_path: a `tokenizer.json`; each worker loads it for itself.
        options: see `StreamOptions`.
        rank, world_size: this process among those that train together.
    """

    def __init__(self, shards: TextShards, tokenizer_path: str, options: StreamOptions, *, rank: int, world_size: int) -> None:
        super().__init__()
        self.shards, self.tokenizer_path, self.options, self.rank, self.world_size = shards, tokenizer_path, options, rank, world_size

    def __iter__(self) -> PackedIterator:
        worker = get_worker_info()
        if worker is not None:
            # The workers are the parallelism.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        worker_id, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        stream = DocumentStream(
            self.shards,
            consumer=self.rank * num_workers + worker_id,
            num_consumers=self.world_size * num_workers,
            seed=self.options.seed,
            shuffle=self.options.shuffle,
            shuffle_block=self.options.shuffle_block,
            validation_fraction=self.options.validation_fraction,
            max_bad_line_share=self.options.max_bad_line_share,
        )
        return PackedIterator(stream, load_tokenizer(self.tokenizer_path), self.options)


@dataclass(frozen=True)
class _Document:
    block: Block
    index: int
    tokens: npt.NDArray[np.int64]


class PackedIterator(Iterator[Batch]):
    """Batches of one consumer.

    The state is the place of the next window's first token: the block of documents it lies in, the document's number there, and the token's
    in the document. The tokens after it are read again on resume, so that the state stays small however long a document is.
    """

    def __init__(self, stream: DocumentStream, tokenizer: Tokenizer, options: StreamOptions) -> None:
        self._stream, self._tokenizer, self._options = stream, tokenizer, options
        self._waiting: deque[_Document] = deque()
        self._num_waiting = 0
        self._start({"block": asdict(Cursor()), "index": 0, "offset": 0, "counts": LineCounts().as_dict()})

    def _start(self, state: dict[str, Any]) -> None:
        self._state, self._offset = state, int(state["offset"])
        self.counts = LineCounts(**state["counts"])
        self._documents = self._encode(Cursor(**state["block"]), int(state["index"]))
        self._waiting.clear()
        self._num_waiting = 0

    def __next__(self) -> Batch:
        spans = np.stack([self._next_span() for _ in range(self._options.batch_size)])
        self._remember()
        return to_tensors(cut(spans, self._tokenizer.eod_id, self._options.reset_at_documents))

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._start(dict(state))

    def _encode(self, start: Cursor, skip: int) -> Iterator[_Document]:
        for block in self._stream.blocks(start, self.counts):
            for first in range(skip, len(block.texts), _ENCODE_TOGETHER):
                encoded = self._tokenizer.encode_batch(block.texts[first : first + _ENCODE_TOGETHER])
                for index, ids in enumerate(encoded, start=first):
                    yield _Document(block, index, np.asarray([*ids, self._tokenizer.eod_id], dtype=np.int64))
            skip = 0

    def _next_span(self) -> npt.NDArray[np.int64]:
        """The token before the window, its `seq_len` tokens, and the one after; the window moves on by `seq_len`."""
        seq_len = self._options.seq_len
        while self._num_waiting - self._offset < seq_len + 1:
            document = next(self._documents)
            self._waiting.append(document)
            self._num_waiting += len(document.tokens)
        span = np.empty(seq_len + 2, dtype=np.int64)
        span[0] = self._waiting[0].tokens[self._offset - 1] if self._offset else self._tokenizer.eod_id
        filled, offset = 1, self._offset
        for document in self._waiting:
            piece = document.tokens[offset : offset + len(span) - filled]
            span[filled : filled + len(piece)] = piece
            filled, offset = filled + len(piece), 0
            if filled == len(span):
                break
        self._offset += seq_len
        # At least one token waits beyond the window, so that the deque never runs empty here.
        while self._offset >= len(self._waiting[0].tokens):
            length = len(self._waiting.popleft().tokens)
            self._offset -= length
            self._num_waiting -= length
        return span

    def _remember(self) -> None:
        first = self._waiting[0]
        self._state = {"block": asdict(first.block.start), "index": first.index, "offset": self._offset, "counts": first.block.counts}


class ArrayWindows:
    """Random access to windows of a token array that is held in memory: the validation split of a text source.

    Args:
        tokens: (N,) int64, documents with their end-of-document tokens.
        seq_len, eod_id, reset_at_documents: as elsewhere.
    """

    def __init__(self, tokens: npt.NDArray[np.int64], seq_len: int, eod_id: int, reset_at_documents: bool) -> None:
        self._tokens = np.concatenate([np.asarray([eod_id], dtype=np.int64), tokens])
        self._seq_len, self._eod_id, self._reset = seq_len, eod_id, reset_at_documents
        self.num_windows = max(0, (len(tokens) - 1) // seq_len)

    def batch(self, windows: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        starts = windows[:, None] * self._seq_len + np.arange(self._seq_len + 2)[None, :]
        return cut(self._tokens[starts], self._eod_id, self._reset)
