import hashlib
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from datamodules import sample
from datamodules.sample import DEFAULT_VOCAB_SIZE, TRAIN_SEED, VALIDATION_SEED, ensure_sample, sample_folder
from datamodules.sample_text import SampleText
from datamodules.tokens import load_manifest


def test_the_text_is_the_same_on_every_machine_and_python() -> None:
    documents = json.dumps(list(SampleText(1).documents(200))).encode()
    assert hashlib.sha256(documents).hexdigest() == "72872d0564f7dfd21dea36812abd2d887e0251a9d0da26a285fbbecbf48a66bb"


def test_documents_have_the_form_of_c4_and_recall_what_they_told() -> None:
    documents = list(SampleText(5).documents(50))
    assert all(set(document) == {"text", "timestamp", "url"} for document in documents)
    name = documents[0]["text"].split()[0]
    assert documents[0]["text"].count(name) >= 2
    assert len({document["text"] for document in documents}) == 50


def test_training_and_validation_share_words_but_no_document() -> None:
    train = {document["text"] for document in SampleText(TRAIN_SEED).documents(2_000)}
    validation = [document["text"] for document in SampleText(VALIDATION_SEED).documents(400)]
    assert not train & set(validation)
    words = set(" ".join(train).split())
    known = [word in words for text in validation for word in text.split()]
    assert np.mean(known) > 0.9


def test_the_cached_sample(sample_cache: Path) -> None:
    started = time.monotonic()
    folder = ensure_sample(sample_cache)
    assert folder == sample_folder(sample_cache, DEFAULT_VOCAB_SIZE) / "tokens"
    manifest = load_manifest(folder)
    assert manifest["vocab_size"] == 4_096
    assert manifest["splits"]["train"]["tokens"] > 2_000_000
    assert manifest["splits"]["validation"]["documents"] == 400
    # What is there is not made again: no leftovers of a second making, and the files are untouched.
    assert (folder / "manifest.json").stat().st_mtime < time.time() - (time.monotonic() - started)
    assert not [
        path for path in sample_cache.iterdir() if path.name.startswith(".sample") and (path / "tokens" / "manifest.json").is_file()
    ]


@pytest.fixture
def small_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "TRAIN_DOCUMENTS", 300)
    monkeypatch.setattr(sample, "VALIDATION_DOCUMENTS", 20)


@pytest.mark.usefixtures("small_sample")
def test_a_damaged_cache_names_the_folder_to_delete(tmp_path: Path) -> None:
    tokens = ensure_sample(tmp_path, 600)
    (tokens / "train-00000.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"^the cached sample is damaged: delete the folder {tokens.parent} and start again \("):
        ensure_sample(tmp_path, 600)


@pytest.mark.usefixtures("small_sample")
def test_processes_make_it_at_once(tmp_path: Path) -> None:
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("fork")) as pool:
        folders = [pool.submit(ensure_sample, tmp_path, 600) for _ in range(3)]
        assert len({folder.result() for folder in folders}) == 1
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.usefixtures("small_sample")
def test_a_vocabulary_that_the_sample_cannot_fill_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^the text fills a vocabulary of only \d+ tokens, not vocab_size=60000"):
        ensure_sample(tmp_path, 60_000)
    assert not list(tmp_path.iterdir())
