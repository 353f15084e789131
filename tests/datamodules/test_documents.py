import json
import os
from pathlib import Path

import pytest

from datamodules.documents import LineCounts, is_validation, parse_line, probe_files, read_lines, resolve_files


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "good"}', None),
        ('\ufeff{"text": "çağ"}'.encode(), None),
        (b'{"text": "cut', "not_json"),
        (b"[1, 2]", "not_json"),
        (b"[" * 20_000, "not_json"),
        (b'{"url": "x"}', "no_text"),
        (b'{"text": 3}', "no_text"),
        (b'{"text": "\xff\xfe"}', "not_utf8"),
        (b'{"text": "\\ud800"}', "not_utf8"),
        (b'{"text": "  "}', "empty"),
        (b"", "empty"),
    ],
)
def test_each_kind_of_bad_line_is_told_apart(line: bytes, reason: str | None) -> None:
    text, found = parse_line(line)
    assert found == reason
    assert (text is None) == (reason is not None)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.xz"])
def test_lines_of_every_compression(tmp_path: Path, suffix: str, write_lines, json_lines) -> None:
    lines = [*json_lines(["eins\u2028zwei", "trois\x85quatre"]), b"\xff\xfe\x0b bad", json_lines(["end"])[0]]
    path = write_lines(tmp_path / f"part.{suffix}", lines)
    assert list(read_lines(str(path))) == lines
    assert list(read_lines(str(path), skip=2)) == lines[2:]


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.xz"])
def test_a_truncated_file_is_named(tmp_path: Path, suffix: str, write_lines, json_lines, texts: list[str]) -> None:
    path = write_lines(tmp_path / f"part.{suffix}", json_lines(texts))
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(ValueError, match=r"part\.jsonl\.\w+ is damaged after line \d+: .*fetch the file again$"):
        list(read_lines(str(path)))


def test_something_else_called_gz_is_named(tmp_path: Path) -> None:
    (tmp_path / "part.gz").write_bytes(b"no gzip at all")
    with pytest.raises(ValueError, match=r"part\.gz is damaged after line 0"):
        list(read_lines(str(tmp_path / "part.gz")))


def test_bad_lines_are_counted_and_fail_past_a_share() -> None:
    counts = LineCounts()
    for number in range(100):
        counts.add("not_json" if number in (40, 70) else "empty" if number == 80 else None, f"f:{number + 1}")
    assert (counts.lines, counts.skipped, counts.not_json, counts.empty, counts.first_bad) == (100, 3, 2, 1, "f:41")
    counts.require_share(0.03, final=True)
    counts.require_share(0.0, final=False)  # too few lines yet to judge
    with pytest.raises(
        ValueError, match=r"^too many bad lines: skipped 3 of 100 lines \(3\.00 %: 2 no JSON object, 1 empty\), the first at f:41; "
    ):
        counts.require_share(0.02, final=True)


def test_the_share_is_judged_early_in_long_files() -> None:
    counts = LineCounts()
    for number in range(1000):
        counts.add("no_text" if number % 2 else None, f"f:{number + 1}")
    with pytest.raises(ValueError, match="skipped 500 of 1,000 lines"):
        counts.require_share(0.01, final=False)


def test_globs_that_match_nothing_or_only_empty_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^train_files: no file matches '.*\*\.jsonl'"):
        resolve_files(str(tmp_path / "*.jsonl"), "train_files")
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ValueError, match=r"^train_files: every file that matches '.*' is empty"):
        resolve_files(str(tmp_path / "*.jsonl"), "train_files")
    with pytest.raises(ValueError, match=r"^train_files is empty"):
        resolve_files([], "train_files")


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text("x")
    # Permissions do not bind root, under whom CI may run: the answer of the system is what is replaced.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=r"^train_files: no permission to read .*a\.jsonl; change its mode"):
        resolve_files(str(tmp_path / "*.jsonl"), "train_files")


def test_globs_are_sorted_and_without_repetition(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "odd[1].jsonl"):
        (tmp_path / name).write_text("x")
    found = resolve_files([str(tmp_path / "odd[1].jsonl"), str(tmp_path / "*.jsonl")], "files")
    assert [Path(path).name for path in found] == ["odd[1].jsonl", "a.jsonl", "b.jsonl"]


def test_a_file_that_is_no_jsonl_is_refused_at_once(tmp_path: Path, write_lines, json_lines) -> None:
    text = write_lines(tmp_path / "book.txt", [b"It was a dark night."] * 60)
    with pytest.raises(ValueError, match=r"^files: none of the first 60 lines of .*book\.txt is a document"):
        probe_files([str(text)], "files", 0.01)
    with pytest.raises(ValueError, match=r"^too many bad lines: skipped 1 of 3 lines"):
        probe_files([str(write_lines(tmp_path / "short.jsonl", [*json_lines(["a", "b"]), b"{"]))], "files", 0.01)
    # A few bad lines at the head of a long file are not past the share.
    probe_files([str(write_lines(tmp_path / "long.jsonl", [b"{"] * 9 + json_lines(["a"] * 1200)))], "files", 0.01)


def test_the_hash_split_keeps_copies_together_and_has_the_right_size() -> None:
    texts = [json.dumps(number) for number in range(20_000)]
    chosen = [is_validation(text, 0.1) for text in texts]
    assert chosen == [is_validation(text, 0.1) for text in texts]
    assert 1_800 < sum(chosen) < 2_200  # mean 2,000, standard deviation 42
    assert not any(is_validation(text, 0.0) for text in texts[:100])
