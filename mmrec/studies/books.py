"""Held-out books for a long read: pieces joined to whole texts, tokens of them, windows of a length."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from datamodules.pieces import joined_records, piece_of
from datamodules.sample_text import SampleText
from datamodules.tokenizer import Tokenizer
from mmrec.commandline.errors import BadInputError

_BAD_LINES = 0.01  # share of lines that may be skipped
_SAMPLE_SEED, _SAMPLE_BOOKS, _SAMPLE_PIECES = 3, 4, 24  # no seed of the built-in text's


class Book(NamedTuple):
    """A whole text, or a stretch of one between two missing pieces.

    Attributes:
        name: stretches of one book share it, a piece that is there twice too.
        tokens: (N,) int32.
    """

    name: str
    tokens: npt.NDArray[np.int32]


class Windows(NamedTuple):
    """Stretches of books, none overlapping another.

    Attributes:
        tokens: (N, length + 1) int32; the last token of each is only a label.
        books: N names.
    """

    tokens: npt.NDArray[np.int32]
    books: list[str]


def read_books(files: Sequence[str], tokenizer: Tokenizer) -> list[Book]:
    """All books of JSON-lines files, their pieces joined in order; where one is missing the book is cut in two.

    Raises:
        ValueError: a file that is damaged, or holds other things than documents.
    """
    records = list(joined_records(files, _BAD_LINES))
    ids = tokenizer.encode_batch([record["text"] for record in records])
    # Copies of a piece stay pieces: by their own names they would count as books of their own.
    names = [str(piece_of(record)[0] or record.get("url") or f"text {number}") for number, record in enumerate(records)]
    return [Book(name, np.asarray(tokens, dtype=np.int32)) for name, tokens in zip(names, ids, strict=True)]


def windows_of(books: Sequence[Book], length: int) -> Windows:
    """All windows of `length` tokens and a label more, one after the other from each book's start; what is left over is not read.

    Raises:
        BadInputError: no book is long enough.
    """
    tokens, names = [], []
    for book in books:
        for start in range(0, len(book.tokens) - length, length):
            tokens.append(book.tokens[start : start + length + 1])
            names.append(book.name)
    if not tokens:
        longest = max((len(book.tokens) for book in books), default=0)
        raise BadInputError(f"no book has the {length + 1:,} tokens of a window, the longest has {longest:,}; give less with --lengths")
    return Windows(np.stack(tokens), names)


def write_sample_books(path: Path) -> None:
    """Books of the built-in text's invented words, in pieces, for a try without any data."""
    documents = iter(SampleText(_SAMPLE_SEED).documents(_SAMPLE_BOOKS * _SAMPLE_PIECES))
    records = [next(documents) | {"url": f"sample:{book}#{piece}"} for book in range(_SAMPLE_BOOKS) for piece in range(_SAMPLE_PIECES)]
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
