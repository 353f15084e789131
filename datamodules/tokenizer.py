"""Byte-level BPE tokenizer: training, loading, and the small interface that the rest of the code sees."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from datamodules.fingerprint import sha256_of
from mmrec.files import write_atomically

EOD = "<|endoftext|>"
_BYTES = 256


class Tokenizer:
    """A trained tokenizer. Token ids are ints in `[0, vocab_size)`; `eod_id` is the end-of-document token."""

    def __init__(self, tokenizer: HFTokenizer, path: str | Path) -> None:
        eod_id = tokenizer.token_to_id(EOD)
        if eod_id is None:
            raise ValueError(f"tokenizer {path} has no end-of-document token {EOD}: train one with `python -m mmrec.cli prepare`")
        self.path = str(path)
        self.eod_id: int = eod_id
        # The largest id counts, not the number of entries: some vocabularies have holes.
        self.vocab_size: int = max(tokenizer.get_vocab().values()) + 1
        # Only packing may end a document: a page that happens to contain the token's name must not.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without the end-of-document token; a text that spells it out is encoded as ordinary text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of several texts, encoded in parallel where `TOKENIZERS_PARALLELISM` allows it."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """The text of token ids; end-of-document tokens are left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's file."""
        return sha256_of(self.path)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a `tokenizer.json`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a tokenizer, or one without `<|endoftext|>`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no tokenizer file {path}: train one with `python -m mmrec.cli prepare --files GLOB --output FOLDER` or correct data.tokenizer"
        )
    try:
        tokenizer = HFTokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises plain Exception
        raise ValueError(f"{path} is not a tokenizer.json of the tokenizers library: {str(error).splitlines()[0]}") from error
    return Tokenizer(tokenizer, path)


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: str | Path) -> Tokenizer:
    """Train a byte-level BPE of exactly `vocab_size` tokens (special and byte tokens included) and write it to `path` atomically.

    Raises:
        ValueError: `vocab_size` below 257 (256 bytes and the end-of-document token), or too little text to fill it.
    """
    if vocab_size < _BYTES + 1:
        raise ValueError(f"vocab_size={vocab_size} is too small for a byte-level BPE: give at least {_BYTES + 1}")
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOD], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the text fills a vocabulary of only {tokenizer.get_vocab_size()} tokens, not vocab_size={vocab_size}: "
            "give more text or a smaller vocab_size"
        )
    write_atomically(path, tokenizer.to_str().encode())
    return Tokenizer(tokenizer, path)
