"""A small corpus of our own text, a tokenizer, and tokens of it, made once a session."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from datamodules.prepare import prepare
from datamodules.sample import ensure_sample
from datamodules.sample_text import SampleText

VOCAB_SIZE = 400


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [document["text"] for document in SampleText(7).documents(90)]


def _write_lines(path: Path, lines: list[bytes]) -> Path:
    content = b"".join(line + b"\n" for line in lines)
    opener = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(opener(content))
    return path


def _json_lines(texts: list[str]) -> list[bytes]:
    return [
        json.dumps({"text": text, "timestamp": "", "url": f"test:{number}"}, ensure_ascii=False).encode()
        for number, text in enumerate(texts)
    ]


@pytest.fixture(scope="session", name="write_lines")
def write_lines_fixture() -> Callable[[Path, list[bytes]], Path]:
    return _write_lines


@pytest.fixture(scope="session", name="json_lines")
def json_lines_fixture() -> Callable[[list[str]], list[bytes]]:
    return _json_lines


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all workers of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """Five shards of unequal size, plain, gz and xz, and one validation file."""
    folder = tmp_path_factory.mktemp("corpus")
    for number, (first, last, suffix) in enumerate(
        [(0, 25, "jsonl"), (25, 35, "jsonl.gz"), (35, 60, "jsonl.xz"), (60, 64, "jsonl"), (64, 80, "jsonl")]
    ):
        _write_lines(folder / f"train-{number}.{suffix}", _json_lines(texts[first:last]))
    _write_lines(folder / "validation.jsonl.gz", _json_lines(texts[80:]))
    return folder


@pytest.fixture(scope="session")
def tokens_dir(corpus: Path) -> Path:
    """The corpus' tokens, in shards that documents do not fit into evenly."""
    folder = corpus / "tokens"
    prepare(
        str(corpus / "train-*"), str(folder), vocab_size=VOCAB_SIZE, validation_files=str(corpus / "validation*"), shard_tokens=7_001,
        workers=0, progress=False,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def tokenizer_path(tokens_dir: Path) -> str:
    return str(tokens_dir / "tokenizer.json")


@pytest.fixture(scope="session")
def sample_cache(shared: Path) -> Path:
    """The built-in sample, made once: processes that make it at the same time do not disturb each other."""
    cache = shared / "sample-cache"
    ensure_sample(cache)
    return cache
