"""`prepare`: from JSON-lines documents to a BPE tokenizer and memory-mapped token shards."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn

from datamodules.documents import LineCounts, parse_line, probe_files, read_lines, resolve_files
from datamodules.fingerprint import corpus_fingerprint, fingerprint_of, sha256_of
from datamodules.pieces import write_joined
from datamodules.shard_writer import ShardWriter
from datamodules.tokenise import Split, read_chunks, tokenise_chunks
from datamodules.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from datamodules.tokens import FORMAT, MANIFEST, load_manifest
from mmrec.files import TEMPORARY_SUFFIX, remove_leftovers, require_writable, write_atomically

_logger = logging.getLogger(__name__)
_PROGRESS = "progress.json"
_TOKENIZER = "tokenizer.json"
_JOINED = "joined.jsonl"
Patterns = str | Sequence[str]


def prepare(
    files: Patterns,
    output: str,
    *,
    vocab_size: int | None = None,
    tokenizer: str | None = None,
    validation_files: Patterns | Mapping[str, Patterns] | None = None,
    validation_fraction: float = 0.005,
    workers: int | None = None,
    shard_tokens: int = 1 << 26,
    tokenizer_bytes: int = 1 << 28,
    max_bad_line_share: float = 0.01,
    join_pieces: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a BPE tokenizer on documents and write them as memory-mapped tokens.

    Killed at any moment and started again with the same arguments it goes on, and the folder ends with the same bytes. The result does not
    depend on `workers`.

    Args:
        files: globs of JSON-lines files (plain, .gz, .xz) to train on.
        output: the folder to write; it becomes `data.tokens_dir`.
        vocab_size: size of the byte-level BPE to train; default 32,000 where no tokenizer is given.
        tokenizer: an existing `tokenizer.json` to use instead.
        validation_files: globs of validation files, or a mapping of source names to globs; None: a share of the documents, by hash.
        validation_fraction: that share, in (0, 1).
        workers: processes; default: the cores that this process may use.
        shard_tokens: tokens a shard file.
        tokenizer_bytes: bytes of text that the BPE is trained on, an equal part from the head of each file.
        max_bad_line_share: share of lines that may be skipped (no JSON, no text, no UTF-8, empty).
        join_pieces: join training documents whose `url` is NAME#NUMBER to one document a NAME, in the order of the numbers, a blank line
            between them. All of them are read into memory first, and take their own size on the disk for a while. The vocabulary is
            that without joining, and validation documents stay as they are, so that losses on them compare; those that
            `validation_fraction` takes are missing from their texts, which are cut there.
        progress: show a progress bar.

    Returns:
        The manifest.

    Raises:
        FileNotFoundError, PermissionError, NotADirectoryError, ValueError: bad input, one line; nothing half-written stays.
    """
    train = resolve_files(files, "files")
    splits = {"train": train, **_validation_splits(validation_files, train)}
    _check_numbers(validation_fraction, shard_tokens, max_bad_line_share, vocab_size, tokenizer, workers, hashed=validation_files is None)
    require_writable(output, "output folder")
    for name, paths in splits.items():
        probe_files(paths, "files" if name == "train" else f"validation_files ({name})", max_bad_line_share)
    settings = {
        "format": FORMAT,
        "corpus": {name: corpus_fingerprint(paths) for name, paths in splits.items()},
        "vocab_size": (vocab_size or 32_000) if tokenizer is None else None,
        "tokenizer": None if tokenizer is None else sha256_of(load_tokenizer(tokenizer).path),
        "tokenizer_bytes": tokenizer_bytes if tokenizer is None else None,
        "validation_fraction": validation_fraction if validation_files is None else None,
        "shard_tokens": shard_tokens,
        "max_bad_line_share": max_bad_line_share,
    }
    if join_pieces:  # only then: folders written before there was the option keep their fingerprint
        settings["join_pieces"] = True
    folder = Path(output)
    finished = _claim(folder, fingerprint_of(settings))
    if finished is not None:
        return finished
    bar = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>5.1f} %"),
        TextColumn("{task.fields[tokens]:,} tokens"), TimeRemainingColumn(), disable=not progress, transient=False,
    )  # fmt: skip
    try:
        with bar:
            return _write(folder, splits, settings, tokenizer, _usable_cores() if workers is None else workers, bar)
    except ValueError:
        _withdraw(folder)
        raise


def _write(
    folder: Path, splits: dict[str, list[str]], settings: dict[str, Any], given: str | None, workers: int, bar: Progress
) -> dict[str, Any]:
    fraction = settings["validation_fraction"] or 0.0
    bpe = _tokenizer(folder, splits["train"], settings, given, bar)
    dtype = "uint16" if bpe.vocab_size <= 1 << 16 else "uint32"
    record = json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))
    sides = {name: Split() for name in splits}
    if fraction > 0.0:
        splits = {"train": splits["train"], "validation": splits["train"]}
        sides = {"train": Split(fraction, validation=False), "validation": Split(fraction, validation=True)}
    if settings.get("join_pieces"):
        splits = {**splits, "train": [_joined(folder, splits["train"], sides["train"], settings, record, bar)]}
        sides["train"] = Split()  # the joined ones were chosen before
    entries: dict[str, Any] = {}
    for name, paths in splits.items():

        def on_shard(state: dict[str, Any], name: str = name) -> None:
            record["splits"][name] = state
            write_atomically(folder / _PROGRESS, json.dumps(record).encode())

        writer = ShardWriter(folder, name, dtype, settings["shard_tokens"], paths, record["splits"].get(name), on_shard)
        _write_split(writer, paths, bpe, sides[name], workers, settings["max_bad_line_share"], bar, name)
        entries[name] = writer.close()
        if entries[name]["tokens"] == 0:
            raise ValueError(f"split {name!r} got no document: give more text, validation files, or a larger validation_fraction")
    manifest = {
        "format": FORMAT,
        "fingerprint": fingerprint_of(settings),
        "dtype": dtype,
        "vocab_size": bpe.vocab_size,
        "eod_id": bpe.eod_id,
        "tokenizer": {"file": _TOKENIZER, "sha256": bpe.fingerprint},
        "settings": settings,
        "splits": entries,
    }
    if "joined" in record:
        manifest["joined"] = record["joined"]
    (folder / _JOINED).unlink(missing_ok=True)  # before the manifest, after which nothing is tidied up any more
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    (folder / _PROGRESS).unlink()
    return manifest


def _joined(folder: Path, files: list[str], side: Split, settings: dict[str, Any], record: dict[str, Any], bar: Progress) -> str:
    """The file of joined pieces; what became of them is remembered in `record`, for the manifest."""
    path = folder / _JOINED
    if not path.is_file() or "joined" not in record:  # it is written atomically, so one that is there is whole
        task = bar.add_task("join pieces", total=1, tokens=0)
        record["joined"] = asdict(write_joined(files, path, settings["max_bad_line_share"], side))
        write_atomically(folder / _PROGRESS, json.dumps(record).encode())
        bar.update(task, completed=1)
    return str(path)


def _write_split(
    writer: ShardWriter, paths: list[str], bpe: Tokenizer, side: Split, workers: int, max_bad_line_share: float, bar: Progress, name: str
) -> None:
    sizes = [os.path.getsize(path) for path in paths]
    task = bar.add_task(f"tokenise {name}", total=sum(sizes), tokens=writer.tokens)
    file, line = writer.cursor
    for result in tokenise_chunks(read_chunks(paths, file, line), bpe.path, side, workers):
        writer.add(result)
        writer.counts.require_share(max_bad_line_share, final=False)
        bar.update(task, completed=sum(sizes[: result.chunk.file]) + result.chunk.position, tokens=writer.tokens)
    writer.counts.require_share(max_bad_line_share, final=True)
    if writer.counts.skipped and not side.validation:  # the validation side of a hash split reads the same lines again
        _logger.warning("%s: %s", name, writer.counts.summary())
    bar.update(task, completed=sum(sizes), tokens=writer.tokens)


def _tokenizer(folder: Path, files: list[str], settings: dict[str, Any], given: str | None, bar: Progress) -> Tokenizer:
    path = folder / _TOKENIZER
    if given is not None:
        write_atomically(path, Path(given).read_bytes())
    elif not path.is_file():  # it is written atomically, so one that is there is whole
        task = bar.add_task("read for BPE", total=settings["tokenizer_bytes"], tokens=0)
        train_tokenizer(_texts(files, settings, bar, task), settings["vocab_size"], path)
    return load_tokenizer(path)


def _texts(files: list[str], settings: dict[str, Any], bar: Progress, task: TaskID) -> Iterator[str]:
    """Text for the BPE: an equal number of bytes from the head of each file, without the documents kept for validation."""
    side, counts = Split(settings["validation_fraction"] or 0.0), LineCounts()
    for path in files:
        size = 0
        for number, line in enumerate(read_lines(path), start=1):
            text, reason = parse_line(line)
            counts.add(reason, f"{path}:{number}")
            counts.require_share(settings["max_bad_line_share"], final=False)
            if text is None or not side.holds(text):
                continue
            yield text
            size += len(line)
            bar.advance(task, len(line))
            if size >= settings["tokenizer_bytes"] // len(files):
                break
    bar.update(task, description="train the BPE", completed=settings["tokenizer_bytes"])


def _claim(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """Begin in a folder, or go on there; the manifest where the same work is already done.

    Raises:
        ValueError: the folder holds something else.
    """
    advice = "choose another output folder or empty this one"
    if (folder / MANIFEST).is_file():
        manifest = load_manifest(folder)
        if manifest.get("fingerprint") != fingerprint:
            raise ValueError(f"output folder {folder} holds tokens prepared from other files or settings; {advice}")
        return manifest
    if (folder / _PROGRESS).is_file():
        if json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))["fingerprint"] != fingerprint:
            raise ValueError(f"output folder {folder} holds an unfinished preparation of other files or settings; {advice}")
        remove_leftovers(folder)
        return None
    if folder.is_dir() and any(not path.name.endswith(TEMPORARY_SUFFIX) for path in folder.iterdir()):
        raise ValueError(f"output folder {folder} is not empty and holds no prepared tokens; {advice}")
    write_atomically(folder / _PROGRESS, json.dumps({"fingerprint": fingerprint, "splits": {}}).encode())
    return None


def _withdraw(folder: Path) -> None:
    """After an error in the input nothing half-written stays: a mended input has another fingerprint and starts anew anyway."""
    remove_leftovers(folder)
    for path in [*folder.glob("*.bin"), folder / _JOINED, folder / _TOKENIZER, folder / _PROGRESS]:
        path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _validation_splits(patterns: Patterns | Mapping[str, Patterns] | None, train: list[str]) -> dict[str, list[str]]:
    named = validation_sources(patterns)
    splits = {("validation" if name is None else f"validation-{name}"): files for name, files in named.items()}
    for files in splits.values():
        require_disjoint(train, files)
    return splits


def validation_sources(patterns: Patterns | Mapping[str, Patterns] | None) -> dict[str | None, list[str]]:
    """Files of each named validation source; one without a name has the key None.

    Raises:
        FileNotFoundError, PermissionError, ValueError: see `resolve_files`; a name that no tag can hold.
    """
    if patterns is None:
        return {}
    if not isinstance(patterns, Mapping):
        return {None: resolve_files(patterns, "validation_files")}
    if not patterns:
        raise ValueError("validation_files is empty: give at least one source or leave it out")
    for name in patterns:
        if not name or not all(letter.isalnum() or letter in "_-." for letter in name):
            raise ValueError(f"validation_files: {name!r} cannot name a source; use letters, digits, '_', '-' and '.'")
    return {name: resolve_files(globs, f"validation_files ({name})") for name, globs in patterns.items()}


def require_disjoint(train: list[str], validation: list[str]) -> None:
    """Raise a ValueError where a file is given for training and for validation."""
    both = {os.path.realpath(path) for path in train} & {os.path.realpath(path) for path in validation}
    if both:
        raise ValueError(f"{min(both)} is given both for training and for validation; leave it out of one of them")


def _check_numbers(
    fraction: float, shard_tokens: int, share: float, vocab_size: int | None, tokenizer: str | None, workers: int | None, *, hashed: bool
) -> None:
    if hashed and not 0.0 < fraction < 1.0:
        raise ValueError(f"validation_fraction={fraction} must lie between 0 and 1 where no validation files are given")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens={shard_tokens} must be at least 1")
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"max_bad_line_share={share} must lie between 0 and 1")
    if workers is not None and workers < 0:
        raise ValueError(f"workers={workers} must be 0 or more")
    if vocab_size is not None and vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size} is too small for a byte-level BPE: give at least 257")
    if vocab_size is not None and tokenizer is not None:
        raise ValueError("give either a tokenizer or a vocab_size to train one, not both")


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
