"""The built-in sample on disk: its documents as JSON lines, a BPE trained on them, and their tokens, made once in a few seconds."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import tokenizers

from datamodules.fingerprint import fingerprint_of
from datamodules.prepare import prepare
from datamodules.sample_text import GENERATOR_VERSION, SampleText
from datamodules.tokens import MANIFEST, load_manifest
from mmrec.files import require_writable, write_atomically

TRAIN_DOCUMENTS = 8_000
VALIDATION_DOCUMENTS = 400
TRAIN_SEED, VALIDATION_SEED = 1, 2
DEFAULT_VOCAB_SIZE = 4_096


def sample_fingerprint(vocab_size: int) -> str:
    """Fingerprint of everything that the sample depends on."""
    return fingerprint_of(
        [GENERATOR_VERSION, TRAIN_DOCUMENTS, VALIDATION_DOCUMENTS, TRAIN_SEED, VALIDATION_SEED, vocab_size, tokenizers.__version__]
    )


def sample_folder(cache: str | Path, vocab_size: int) -> Path:
    """Where the sample lies under a cache folder: `train.jsonl`, `validation.jsonl` and the tokens folder `tokens`."""
    return Path(cache) / f"sample-{vocab_size}-{sample_fingerprint(vocab_size)[:12]}"


def require_sample_or_place(cache: str | Path, vocab_size: int) -> None:
    """Raise a one-line OSError, as `require_writable` does, where the sample is yet to be made and cannot be written."""
    if not (sample_folder(cache, vocab_size) / "tokens" / MANIFEST).is_file():
        require_writable(cache, "the built-in text's folder (data.cache_dir)")


def ensure_sample(cache: str | Path, vocab_size: int = DEFAULT_VOCAB_SIZE) -> Path:
    """Make the sample unless it is there, and return its tokens folder.

    It is built in a folder beside its place and renamed: processes that do so at once do not disturb each other.

    Raises:
        ValueError: the sample's text cannot fill `vocab_size`, or the cached sample is damaged.
        OSError: the sample is to be made and the cache folder cannot be written.
    """
    target = sample_folder(cache, vocab_size)
    tokens = target / "tokens"
    if (tokens / MANIFEST).is_file():
        try:
            load_manifest(tokens, vocab_size)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"the cached sample is damaged: delete the folder {target} and start again ({error})") from error
        return tokens
    require_sample_or_place(cache, vocab_size)
    Path(cache).mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=cache))
    try:
        for name, seed, count in (("train", TRAIN_SEED, TRAIN_DOCUMENTS), ("validation", VALIDATION_SEED, VALIDATION_DOCUMENTS)):
            lines = [json.dumps(document, ensure_ascii=False) for document in SampleText(seed).documents(count)]
            write_atomically(building / f"{name}.jsonl", ("\n".join(lines) + "\n").encode())
        prepare(
            str(building / "train.jsonl"),
            str(building / "tokens"),
            vocab_size=vocab_size,
            validation_files=str(building / "validation.jsonl"),
            workers=1,
            progress=False,
        )
        building.chmod(0o755)
        try:
            os.rename(building, target)
        except OSError:
            if not (tokens / MANIFEST).is_file():  # not lost to another process that was faster
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return tokens
