import json
from pathlib import Path

import pytest

from datamodules.tokenizer import EOD, load_tokenizer, train_tokenizer


def test_round_trip_of_any_text(tokenizer_path: str) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    text = "Ağaç 木\n\n\ttabs  and 😀 \x00 bytes"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids) < tokenizer.vocab_size == 400
    assert tokenizer.encode_batch([text, "x"]) == [ids, tokenizer.encode("x")]


def test_no_text_can_end_a_document(tokenizer_path: str) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    ids = tokenizer.encode(f"before {EOD} after")
    assert tokenizer.eod_id not in ids
    assert tokenizer.decode([*ids, tokenizer.eod_id]) == f"before {EOD} after"


def test_training_gives_the_same_file_every_time(tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    for number, parallel in enumerate(("true", "false", "true")):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
        train_tokenizer(texts, 350, tmp_path / f"{number}.json")
        files.append((tmp_path / f"{number}.json").read_bytes())
    assert files[0] == files[1] == files[2]


def test_bad_tokenizers_are_named(tmp_path: Path, texts: list[str], tokenizer_path: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"^no tokenizer file .*none\.json: "):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json is not a tokenizer\.json of the tokenizers library"):
        load_tokenizer(tmp_path / "bad.json")
    content = json.loads(Path(tokenizer_path).read_text())
    content["added_tokens"], content["model"]["vocab"] = [], {"a": 0}
    content["model"]["merges"] = []
    (tmp_path / "no_eod.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"no_eod\.json has no end-of-document token"):
        load_tokenizer(tmp_path / "no_eod.json")
    with pytest.raises(ValueError, match=r"^vocab_size=256 is too small"):
        train_tokenizer(texts, 256, tmp_path / "x.json")
    with pytest.raises(ValueError, match=r"^the text fills a vocabulary of only \d+ tokens, not vocab_size=4000"):
        train_tokenizer(texts[:2], 4000, tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()
