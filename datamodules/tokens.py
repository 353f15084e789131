"""Memory-mapped tokens: the folder that `prepare` writes, and random access to windows of it.

A folder holds `<split>-00000.bin`, ... (little-endian uint16 or uint32, documents one after the other, each with its end-of-document
token), `tokenizer.json` and `manifest.json`, which is written last and names every shard with its number of tokens, largest id and
SHA-256.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from datamodules.fingerprint import fingerprint_of, sha256_of

MANIFEST = "manifest.json"
FORMAT = 1
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


def load_manifest(folder: str | Path, vocab_size: int | None = None) -> dict[str, Any]:
    """Read a tokens folder's manifest and check it against the files: names, sizes, ids.

    Args:
        folder: what `prepare` wrote.
        vocab_size: ids must lie below it; None: below the manifest's own.

    Raises:
        FileNotFoundError: no folder, no manifest, or a shard missing.
        ValueError: the manifest is damaged, a shard has another size, or a token id is out of range.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        unfinished = folder.is_dir() and any(folder.glob("*.bin"))
        hint = (
            "its preparation did not finish: run `python -m mmrec.cli prepare` again"
            if unfinished
            else "write one with `python -m mmrec.cli prepare`"
        )
        raise FileNotFoundError(f"data.tokens_dir: no {MANIFEST} in {folder}; {hint}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = manifest["format"] == FORMAT and manifest["dtype"] in DTYPES
        limit = int(manifest["vocab_size"]) if vocab_size is None else vocab_size
        shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
        expected = [(str(shard["file"]), int(shard["tokens"]), int(shard["max_id"])) for shard in shards]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); run `python -m mmrec.cli prepare` again") from error
    if not known:
        raise ValueError(f"{path} has format {manifest['format']} and dtype {manifest['dtype']}; run `python -m mmrec.cli prepare` again")
    for name, tokens, max_id in expected:
        shard = folder / name
        if not shard.is_file():
            raise FileNotFoundError(f"token shard {shard} is missing; run `python -m mmrec.cli prepare` again")
        size, wanted = shard.stat().st_size, tokens * DTYPES[manifest["dtype"]].itemsize
        if size != wanted:
            raise ValueError(
                f"token shard {shard} has {size:,} bytes, its manifest says {wanted:,}; run `python -m mmrec.cli prepare` again"
            )
        if max_id >= limit:
            raise ValueError(
                f"token id {max_id} in {shard} is out of range for a vocabulary of {limit}: prepare the tokens with this vocabulary"
            )
    return manifest


def verify_checksums(folder: str | Path) -> None:
    """Read every shard and compare it with its SHA-256 in the manifest.

    Raises:
        ValueError: a shard's bytes changed.
    """
    manifest = load_manifest(folder)
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            if sha256_of(Path(folder) / shard["file"]) != shard["sha256"]:
                raise ValueError(
                    f"token shard {Path(folder) / shard['file']} does not match its SHA-256; run `python -m mmrec.cli prepare` again"
                )


class TokenWindows:
    """Windows of `seq_len` tokens over one split of a tokens folder.

    Window `i` has the inputs `stream[i*seq_len : (i+1)*seq_len]` and the labels one token further; windows cross shards.

    Args:
        folder, split: a tokens folder and a split of its manifest (`train`, `validation`, ...).
        seq_len: tokens a window.
        reset_at_documents: add `reset`, true at each document's first token.
    """

    def __init__(self, folder: str | Path, split: str, seq_len: int, *, reset_at_documents: bool = False) -> None:
        self._folder = Path(folder)
        manifest = load_manifest(folder)
        if split not in manifest["splits"]:
            raise ValueError(f"{folder} has no split {split!r}, only {', '.join(manifest['splits'])}")
        self._shards = manifest["splits"][split]["shards"]
        self._dtype = DTYPES[manifest["dtype"]]
        self._vocab_size = int(manifest["vocab_size"])
        self._eod_id = int(manifest["eod_id"])
        self._seq_len = seq_len
        self._reset = reset_at_documents
        self._ends = np.cumsum([shard["tokens"] for shard in self._shards], dtype=np.int64)
        self._maps: dict[int, np.memmap[Any, np.dtype[Any]]] = {}
        total = int(self._ends[-1]) if len(self._ends) else 0
        self.num_windows = max(0, (total - 1) // seq_len)
        if self.num_windows == 0:
            raise ValueError(
                f"split {split!r} of {folder} has {total:,} tokens, too few for one window of seq_len={seq_len}: "
                "prepare more text or lower seq_len"
            )
        self.fingerprint = fingerprint_of([manifest["tokenizer"]["sha256"], [[shard["tokens"], shard["sha256"]] for shard in self._shards]])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def batch(self, windows: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        """`input_ids` and `labels` int64 (B, T) of the given windows (B,), and `reset` bool (B, T) where asked for.

        Raises:
            ValueError: a token id out of the vocabulary's range.
        """
        spans = [self._read(int(window) * self._seq_len - 1, self._seq_len + 2) for window in windows]
        return cut(np.stack(spans), self._eod_id, self._reset)

    def place(self, window: int) -> dict[str, Any]:
        """Of a window's first token, the `file` of the folder that holds it and its number there (`token`)."""
        start = window * self._seq_len
        shard = int(np.searchsorted(self._ends, start, side="right"))
        return {"file": self._shards[shard]["file"], "token": start - (int(self._ends[shard - 1]) if shard else 0)}

    def _read(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """Tokens `[start, start+length)` of the stream; the token before the first is an end of document."""
        out = np.empty(length, dtype=np.int64)
        filled = 0
        if start < 0:
            out[0], filled, start = self._eod_id, 1, 0
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while filled < length:
            offset = start - (int(self._ends[shard - 1]) if shard else 0)
            piece = self._map(shard)[offset : offset + length - filled]
            if piece.size and int(piece.max()) >= self._vocab_size:
                name = self._folder / self._shards[shard]["file"]
                raise ValueError(
                    f"token id {int(piece.max())} in {name} is out of range for a vocabulary of {self._vocab_size}: "
                    "prepare the tokens again"
                )
            out[filled : filled + piece.size] = piece
            filled, start, shard = filled + piece.size, start + piece.size, shard + 1
        return out

    def _map(self, shard: int) -> np.memmap[Any, np.dtype[Any]]:
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self._folder / self._shards[shard]["file"], dtype=self._dtype, mode="r")
        return self._maps[shard]


def cut(spans: npt.NDArray[np.int64], eod_id: int, reset_at_documents: bool) -> dict[str, npt.NDArray[Any]]:
    """Batches from spans (B, T+2): the token before the window, the window, and the token that follows it."""
    batch: dict[str, npt.NDArray[Any]] = {"input_ids": spans[:, 1:-1].copy(), "labels": spans[:, 2:].copy()}
    if reset_at_documents:
        batch["reset"] = spans[:, :-2] == eod_id
    return batch
