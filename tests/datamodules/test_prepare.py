from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules import prepare as prepare_module
from datamodules import shard_writer
from datamodules.documents import is_validation
from datamodules.prepare import prepare
from datamodules.tokenizer import load_tokenizer
from datamodules.tokens import TokenWindows, load_manifest, verify_checksums
from mmrec.files import write_atomically


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _prepare(corpus: Path, folder: Path, **settings: Any) -> dict[str, Any]:
    settings = {"vocab_size": 400, "shard_tokens": 5_003, "workers": 0, "validation_fraction": 0.15, "progress": False, **settings}
    return prepare(str(corpus / "train-*"), str(folder), **settings)


@pytest.fixture(scope="module")
def straight(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A preparation that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight") / "tokens"
    _prepare(corpus, folder)
    return folder


def _documents(folder: Path, split: str) -> list[str]:
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    manifest = load_manifest(folder)
    stream = np.concatenate([np.fromfile(folder / shard["file"], "<u2") for shard in manifest["splits"][split]["shards"]])
    assert stream[-1] == tokenizer.eod_id
    ends = np.flatnonzero(stream == tokenizer.eod_id)
    return [tokenizer.decode(piece.tolist()) for piece in np.split(stream, ends + 1)[:-1]]


def test_every_document_is_there_once_and_the_splits_follow_the_hash(straight: Path, texts: list[str]) -> None:
    verify_checksums(straight)
    manifest = load_manifest(straight)
    assert _documents(straight, "train") == [text for text in texts[:80] if not is_validation(text, 0.15)]
    assert _documents(straight, "validation") == [text for text in texts[:80] if is_validation(text, 0.15)]
    shards = manifest["splits"]["train"]["shards"]
    assert len(shards) > 3
    assert all(shard["tokens"] == 5_003 for shard in shards[:-1])
    assert manifest["splits"]["train"]["documents"] + manifest["splits"]["validation"]["documents"] == 80
    assert manifest["splits"]["train"]["lines"]["lines"] == 80
    assert manifest["settings"]["vocab_size"] == manifest["vocab_size"] == 400
    assert sorted(_contents(straight)) == sorted(
        ["manifest.json", "tokenizer.json", *(shard["file"] for split in manifest["splits"].values() for shard in split["shards"])]
    )


def test_the_number_of_processes_changes_no_byte(corpus: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.tokenise._CHUNK_LINES", 7)
    _prepare(corpus, tmp_path / "tokens", workers=3)
    assert _contents(tmp_path / "tokens") == _contents(straight)


def _killed_at_write(corpus: Path, folder: Path, number: int, after: bool) -> None:
    """Prepare, but die by SIGKILL before or after the `number`-th file is written."""
    written = [0]
    write = write_atomically

    def write_or_die(path: Path, content: bytes) -> None:
        if written[0] == number and not after:
            Path(path).with_name(f".{Path(path).name}.1.tmp").write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, content)
        if written[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        written[0] += 1

    for module in (prepare_module, shard_writer):
        module.write_atomically = write_or_die
    _prepare(corpus, folder)


@pytest.mark.parametrize("after", [False, True])
def test_killed_again_and_again_it_ends_with_the_same_bytes(corpus: Path, straight: Path, tmp_path: Path, after: bool) -> None:
    """Each run gets one file further than the one before, so that every write is once the last."""
    folder, context, kills = tmp_path / "tokens", multiprocessing.get_context("fork"), 0
    for number in range(2, 60):
        process = context.Process(target=_killed_at_write, args=(corpus, folder, number % 4, after))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    _prepare(corpus, folder)
    assert kills > 4
    assert _contents(folder) == _contents(straight)


def test_done_work_is_not_done_again(corpus: Path, straight: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in straight.iterdir()}
    assert _prepare(corpus, straight) == load_manifest(straight)
    assert {path.name: path.stat().st_mtime_ns for path in straight.iterdir()} == before


def test_a_document_longer_than_a_shard(tmp_path: Path, write_lines, json_lines, texts: list[str], straight: Path) -> None:
    documents = ["short", "\n".join(texts), "end"]
    path = write_lines(tmp_path / "long.jsonl.gz", json_lines(documents))
    tokenizer = str(straight / "tokenizer.json")
    validation = write_lines(tmp_path / "val.jsonl", json_lines(texts[:3]))
    settings = {"tokenizer": tokenizer, "validation_files": str(validation), "shard_tokens": 1_000, "progress": False}
    manifest = prepare(str(path), str(tmp_path / "tokens"), workers=0, **settings)
    assert len(manifest["splits"]["train"]["shards"]) > 10
    assert _documents(tmp_path / "tokens", "train") == documents
    assert TokenWindows(tmp_path / "tokens", "train", 700).num_windows > 10
    # Stopped in the middle of that document it goes on there.
    (tmp_path / "again").mkdir()
    arguments = (str(path), str(tmp_path / "again" / "tokens"), settings)
    process = multiprocessing.get_context("fork").Process(target=_killed_long, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert json.loads((tmp_path / "again" / "tokens" / "progress.json").read_text())["splits"]["train"]["cursor"]["offset"] > 0
    prepare(str(path), str(tmp_path / "again" / "tokens"), workers=0, **settings)
    assert _contents(tmp_path / "again" / "tokens") == _contents(tmp_path / "tokens")


def _killed_long(path: str, folder: str, settings: dict[str, Any]) -> None:
    finish = shard_writer.ShardWriter._finish_shard

    def finish_or_die(self: shard_writer.ShardWriter, *cursor: int) -> None:
        finish(self, *cursor)
        if len(self.state["shards"]) == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    shard_writer.ShardWriter._finish_shard = finish_or_die
    prepare(path, folder, workers=0, **settings)


def test_named_validation_sources(corpus: Path, tmp_path: Path, write_lines, json_lines, texts: list[str]) -> None:
    other = write_lines(tmp_path / "other.jsonl", json_lines(texts[:5]))
    folder = tmp_path / "tokens"
    _prepare(corpus, folder, validation_files={"books": str(corpus / "validation*"), "web": [str(other)]}, validation_fraction=0.005)
    assert list(load_manifest(folder)["splits"]) == ["train", "validation-books", "validation-web"]
    assert _documents(folder, "validation-books") == texts[80:]
    assert _documents(folder, "train") == texts[:80]


def test_large_vocabularies_take_four_bytes(tmp_path: Path, write_lines, json_lines, texts: list[str], straight: Path) -> None:
    content = json.loads((straight / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"<filler {number}>": number for number in range(400, 70_000)}
    (tmp_path / "large.json").write_text(json.dumps(content))
    path = write_lines(tmp_path / "a.jsonl", json_lines(texts[:10]))
    large = str(tmp_path / "large.json")
    manifest = prepare(str(path), str(tmp_path / "t"), tokenizer=large, validation_fraction=0.3, workers=0, progress=False)
    assert manifest["dtype"] == "uint32"
    assert manifest["vocab_size"] == 70_000
    assert TokenWindows(tmp_path / "t", "train", 16).batch(np.asarray([0]))["input_ids"].shape == (1, 16)


def test_skipped_lines_are_counted_and_fail_past_the_share(tmp_path: Path, write_lines, json_lines, texts: list[str], caplog) -> None:
    lines = json_lines(texts)
    lines[20:20] = [b"{broken", b'{"text": 5}', b"\xff\xfe\xfa", b""]
    path = write_lines(tmp_path / "part.jsonl.xz", lines)
    settings = {"vocab_size": 300, "validation_fraction": 0.2, "progress": False}
    message = r"^too many bad lines: skipped 4 of 94 lines \(4\.26 %: 1 no JSON object, 1 without .* at .*part\.jsonl\.xz:21; "
    with pytest.raises(ValueError, match=message):
        prepare(str(path), str(tmp_path / "tokens"), workers=2, **settings)
    assert not (tmp_path / "tokens").exists()
    manifest = prepare(str(path), str(tmp_path / "tokens"), max_bad_line_share=0.05, workers=2, **settings)
    assert [message.partition(" (")[0] for message in caplog.messages] == ["train: skipped 4 of 94 lines"]
    lines_read = manifest["splits"]["train"]["lines"]
    assert lines_read == {"lines": 94, "not_json": 1, "no_text": 1, "not_utf8": 1, "empty": 1, "first_bad": f"{path}:21"}


def test_bad_input_is_refused_in_one_line(corpus: Path, straight: Path, tmp_path: Path, write_lines, json_lines, texts) -> None:
    def refused(error: type[Exception], message: str, folder: Path = tmp_path / "tokens", **settings: Any) -> None:
        with pytest.raises(error, match=message) as caught:
            _prepare(settings.pop("corpus", corpus), folder, **settings)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "tokens").exists()

    refused(FileNotFoundError, r"^files: no file matches '.*train-\*'", corpus=tmp_path)
    refused(FileNotFoundError, "^no tokenizer file ", tokenizer=str(tmp_path / "none.json"), vocab_size=None)
    refused(ValueError, r"is given both for training and for validation", validation_files=str(corpus / "train-0*"))
    refused(ValueError, r"^validation_files: 'a/b' cannot name a source", validation_files={"a/b": str(corpus / "validation*")})
    refused(ValueError, r"^vocab_size=100 is too small", vocab_size=100)
    refused(ValueError, r"^give either a tokenizer or a vocab_size", tokenizer=str(straight / "tokenizer.json"))
    refused(ValueError, r"^validation_fraction=0\.0 must lie between", validation_fraction=0.0)
    refused(ValueError, r"^shard_tokens=0 must be at least 1", shard_tokens=0)
    refused(ValueError, r"^max_bad_line_share=2\.0 must lie", max_bad_line_share=2.0)
    refused(ValueError, r"^workers=-1 must be", workers=-1)
    refused(ValueError, r"^the text fills a vocabulary of only \d+ tokens", vocab_size=90_000)
    refused(ValueError, r"^split 'validation' got no document", validation_fraction=1e-9)
    refused(ValueError, r"holds tokens prepared from other files or settings; choose another", folder=straight, shard_tokens=999)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    refused(ValueError, r"mine is not empty and holds no prepared tokens; choose another", folder=tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    refused(NotADirectoryError, r"thesis\.txt/x cannot be written: .*thesis\.txt is a file", folder=tmp_path / "mine" / "thesis.txt" / "x")
    truncated = tmp_path / "cut"
    truncated.mkdir()
    path = write_lines(truncated / "train-0.jsonl.gz", json_lines(texts))
    path.write_bytes(path.read_bytes()[:-3000])
    refused(ValueError, r"train-0\.jsonl\.gz is damaged after line \d+", corpus=truncated, workers=2)


def test_a_folder_that_cannot_be_written(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Permissions do not bind root, under whom CI may run: the answer of the system is what is replaced.
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK))
    with pytest.raises(PermissionError, match=r"^output folder .*tokens cannot be written: no permission in .*; choose another folder$"):
        _prepare(corpus, tmp_path / "tokens")
    assert not list(tmp_path.iterdir())
