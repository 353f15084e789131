"""Pieces of books become books again, in order, and `prepare` can train on them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.pieces import Joining, joined_records, write_joined
from datamodules.prepare import prepare
from datamodules.tokenizer import load_tokenizer
from datamodules.tokens import load_manifest


def _lines(records: list[dict[str, Any]]) -> list[bytes]:
    return [json.dumps(record).encode() for record in records]


def _piece(book: str, number: int, text: str | None = None) -> dict[str, Any]:
    return {"text": text or f"{book} {number}", "timestamp": f"t{number}", "url": f"test:{book}#{number}"}


def test_pieces_of_several_files_are_joined_by_number_and_not_by_name(tmp_path: Path, write_lines) -> None:
    first = write_lines(tmp_path / "a.jsonl.xz", _lines([_piece("B", 10), _piece("A #2\nor", 1), _piece("B", 9)]))
    second = write_lines(tmp_path / "b.jsonl", _lines([_piece("B", 11), _piece("A #2\nor", 0), _piece("B", 8)]))
    assert list(joined_records([str(first), str(second)], 0.0)) == [
        {"text": "B 8\n\nB 9\n\nB 10\n\nB 11", "timestamp": "t8", "url": "test:B"},
        {"text": "A #2\nor 0\n\nA #2\nor 1", "timestamp": "t0", "url": "test:A #2\nor"},
    ]


def test_a_missing_piece_cuts_a_book_and_what_is_no_piece_stays(tmp_path: Path, write_lines) -> None:
    alone = [{"text": "page", "url": "https://x.org/#top"}, {"text": "no url"}, _piece("A", 4, "again")]
    path = write_lines(tmp_path / "a.jsonl", _lines([_piece("A", 5), *alone[:2], _piece("A", 4), _piece("A", 1), alone[2]]))
    texts = [record["text"] for record in joined_records([str(path)], 0.0)]
    assert texts == ["A 1", "A 4\n\nA 5", "page", "no url", "again"]


def test_what_was_joined_is_counted(tmp_path: Path, write_lines) -> None:
    whole = [_piece("whole", number) for number in (2, 0, 1)]
    cut = [_piece("cut", number) for number in (9, 0, 1, 4, 5, 6)]
    rest = [_piece("single", 0), _piece("cut", 5, "a copy"), {"text": "page", "url": "https://x.org/#top"}]
    path = write_lines(tmp_path / "a.jsonl", _lines([*whole, *cut, *rest]))
    joining = write_joined([str(path)], tmp_path / "joined.jsonl", 0.0)
    assert joining == Joining(pieces=10, texts=1, stretches=2, alone=2, others=2)
    assert joining.summary() == (
        "10 pieces became 1 whole texts and, where a piece is missing, 2 stretches; "
        "2 pieces are alone, 2 documents are no piece or a copy of one"
    )


def test_bad_lines_are_an_error_past_their_share(tmp_path: Path, write_lines, caplog: pytest.LogCaptureFixture) -> None:
    path = write_lines(tmp_path / "a.jsonl", [*_lines([_piece("A", 0)]), b"{"])
    with pytest.raises(ValueError, match=r"^too many bad lines: skipped 1 of 2 lines"):
        write_joined([str(path)], tmp_path / "joined.jsonl", 0.4)
    assert not (tmp_path / "joined.jsonl").exists()
    write_joined([str(path)], tmp_path / "joined.jsonl", 0.5)
    assert json.loads((tmp_path / "joined.jsonl").read_text())["text"] == "A 0"
    assert "skipped 1 of 2 lines" in caplog.text


def test_prepare_trains_on_books_and_validates_on_pieces(
    tmp_path: Path, write_lines, texts: list[str], tokenizer_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = [_piece(f"book {number % 3}", number // 3, text) for number, text in enumerate(texts[:12])]
    order = np.random.default_rng(0).permutation(12)
    train = write_lines(tmp_path / "train.jsonl", _lines([pieces[index] for index in order]))
    validation = write_lines(tmp_path / "validation.jsonl", _lines([_piece("C", number, texts[20 + number]) for number in range(4)]))
    settings = {"tokenizer": tokenizer_path, "validation_files": str(validation), "workers": 0, "progress": False}
    folder = tmp_path / "joined"
    manifest = prepare(str(train), str(folder), join_pieces=True, **settings)

    names = list(dict.fromkeys(pieces[index]["url"].partition("#")[0] for index in order))
    books = ["\n\n".join(texts[number] for number in range(12) if f"test:book {number % 3}" == name) for name in names]
    assert _documents(folder, "train") == books
    assert _documents(folder, "validation") == texts[20:24]
    assert manifest["joined"] == {"pieces": 12, "texts": 3, "stretches": 0, "alone": 0, "others": 0}
    assert sorted(path.suffix for path in folder.iterdir()) == [".bin", ".bin", ".json", ".json"]  # the joined text is gone
    assert prepare(str(train), str(folder), join_pieces=True, **settings) == manifest
    with pytest.raises(ValueError, match="holds tokens prepared from other files or settings"):
        prepare(str(train), str(folder), **settings)

    # Stopped after the pieces were joined, it goes on from there and ends with the same bytes.
    again = tmp_path / "again"
    with monkeypatch.context() as patch:
        patch.setattr("datamodules.prepare._write_split", _stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(str(train), str(again), join_pieces=True, **settings)
        progress = json.loads((again / "progress.json").read_text())
        counted = progress.pop("joined")
        (again / "progress.json").write_text(json.dumps(progress))  # as if stopped before the counts were written
        with pytest.raises(KeyboardInterrupt):
            prepare(str(train), str(again), join_pieces=True, **settings)
        assert json.loads((again / "progress.json").read_text())["joined"] == counted
    assert (again / "joined.jsonl").is_file()
    monkeypatch.setattr("datamodules.prepare.write_joined", _stop)
    assert prepare(str(train), str(again), join_pieces=True, **settings) == manifest
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_joining_changes_neither_the_vocabulary_nor_what_is_validated_on(tmp_path: Path, write_lines, texts: list[str]) -> None:
    pieces = [_piece(f"book {number % 8}", number // 8, text) for number, text in enumerate(texts[:80])]
    first, second = (write_lines(tmp_path / f"{part}.jsonl", _lines(pieces[part * 40 : part * 40 + 40])) for part in (0, 1))
    # So little text is read for the BPE that it matters of which files' heads.
    settings = {"vocab_size": 300, "tokenizer_bytes": 20_000, "validation_fraction": 0.15, "workers": 0, "progress": False}
    for name in ("plain", "joined"):
        prepare([str(first), str(second)], str(tmp_path / name), join_pieces=name == "joined", **settings)
    plain, joined = tmp_path / "plain", tmp_path / "joined"
    assert (joined / "tokenizer.json").read_bytes() == (plain / "tokenizer.json").read_bytes()
    held = _documents(plain, "validation")
    assert _documents(joined, "validation") == held
    assert 0 < len(held) < 40
    books = _documents(joined, "train")
    assert [piece for piece in _documents(plain, "train") if not any(piece in book for book in books)] == []
    assert not any(piece in book for piece in held for book in books)
    assert any(texts[number] + "\n\n" + texts[number + 8] in book for number in range(8) for book in books)


def _stop(*arguments: Any) -> None:
    raise KeyboardInterrupt


def _documents(folder: Path, split: str) -> list[str]:
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    stream = np.concatenate([np.fromfile(folder / shard["file"], "<u2") for shard in load_manifest(folder)["splits"][split]["shards"]])
    return [tokenizer.decode(piece.tolist()) for piece in np.split(stream, np.flatnonzero(stream == tokenizer.eod_id) + 1)[:-1]]
