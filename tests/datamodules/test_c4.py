from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules import C4DataModule
from datamodules.documents import is_validation


def _setup(*arguments: Any, **settings: Any) -> C4DataModule:
    data = C4DataModule(*arguments, **settings)
    data.prepare_data()
    data.setup("fit")
    return data


def _local(corpus: Path, tokenizer_path: str, **settings: Any) -> C4DataModule:
    return C4DataModule("local", **{"seq_len": 16, "tokenizer": tokenizer_path, "train_files": str(corpus / "train-*"), **settings})


def test_the_sample_is_the_default_and_needs_nothing(sample_cache: Path) -> None:
    data = _setup(seq_len=128, batch_size=4, cache_dir=str(sample_cache))
    assert data.vocab_size == data.tokenizer.vocab_size == 4_096
    assert data.validation_names == ["val"]
    batch = next(iter(data.train_dataloader()))
    assert batch.keys() == {"input_ids", "labels"}
    for name in batch:
        assert batch[name].shape == (4, 128)
        assert batch[name].dtype == torch.int64
    assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])
    assert len(data.val_dataloader()) == 50


@pytest.mark.parametrize("source", ["hash", "files"])
def test_validation_never_shares_a_document_with_training(
    corpus: Path, tokenizer_path: str, texts: list[str], tmp_path: Path, write_lines, json_lines, source: str
) -> None:
    """With copies of documents in other shards, which a split by place would leak."""
    copies = write_lines(tmp_path / "train-copies.jsonl", json_lines(texts[:40]))
    files = [str(corpus / "train-*"), str(copies)]
    held_out = {"validation_fraction": 0.3} if source == "hash" else {"validation_files": str(corpus / "validation*")}
    data = _setup("local", 64, 4, tokenizer=tokenizer_path, train_files=files, reset_at_documents=True, validation_batches=None, **held_out)
    validation = _documents(data, list(data.val_dataloader()))
    iterator = iter(data.train_dataloader())
    train = _documents(data, [next(iterator) for _ in range(600)])
    assert len(validation) >= 8
    assert len(train) > 50
    assert not train & validation
    if source == "hash":
        assert all(is_validation(text, 0.3) for text in validation)
        assert train == {text for text in texts[:80] if not is_validation(text, 0.3)}


def _documents(data: C4DataModule, batches: list[dict[str, torch.Tensor]]) -> set[str]:
    """Whole documents in the stream that the batches were cut from."""
    stream = torch.cat([batch["input_ids"].flatten() for batch in batches]).tolist()
    groups = itertools.groupby(stream, lambda token: token == data.tokenizer.eod_id)
    pieces = [data.tokenizer.decode(list(group)) for is_end, group in groups if not is_end]
    return set(pieces[1:-1])


def test_several_validation_sources_by_name(corpus: Path, tokenizer_path: str) -> None:
    sources = {"books": str(corpus / "validation*"), "web": [str(corpus / "train-3*")]}
    data = _local(
        corpus, tokenizer_path, train_files=str(corpus / "train-0*"), validation_files=sources, batch_size=2, validation_batches=3
    )
    data.prepare_data()
    data.setup()
    assert data.validation_names == ["books", "web"]
    loaders = data.val_dataloader()
    assert [len(list(loader)) for loader in loaders] == [3, 3]
    first = [next(iter(loader))["input_ids"] for loader in loaders]
    assert not torch.equal(*first)


def test_prepared_tokens_bring_their_splits_tokenizer_and_vocabulary(tokens_dir: Path) -> None:
    data = C4DataModule("tokens", seq_len=32, tokens_dir=str(tokens_dir))
    assert data.vocab_size == 400  # known before anything is set up
    assert data.tokenizer_path == str(tokens_dir / "tokenizer.json")
    data.prepare_data()
    data.setup()
    assert data.validation_names == ["val"]
    assert len(data.predict_dataloader().dataset) <= 400


def test_what_check_refuses_it_refuses_in_one_line(
    corpus: Path, tokenizer_path: str, tokens_dir: Path, tmp_path: Path, write_lines, json_lines, texts
) -> None:
    def refused(error: type[Exception], message: str, data: C4DataModule) -> None:
        with pytest.raises(error, match=message) as caught:
            data.check()
        assert "\n" not in str(caught.value)

    refused(ValueError, r"^data\.seq_len=0 must be at least 1$", C4DataModule(seq_len=0))
    refused(ValueError, r"^data\.batch_size=0 must be at least 1$", C4DataModule(batch_size=0))
    refused(ValueError, r"^data\.num_workers=-1 must be at least 0$", C4DataModule(num_workers=-1))
    refused(ValueError, r"^data\.validation_batches=0 must be at least 1, or null", C4DataModule(validation_batches=0))
    refused(ValueError, r"^data\.vocab_size=200 is too small", C4DataModule(vocab_size=200))
    refused(ValueError, r"^data\.source='hdf5' is unknown; choose one of sample, hub", C4DataModule("hdf5"))
    refused(ValueError, r"^data\.train_files is not read with data\.source=sample, only with local", C4DataModule(train_files="x"))
    refused(ValueError, r"^data\.source=local needs data\.tokenizer; ", _local(corpus, tokenizer_path, tokenizer=None))
    refused(ValueError, r"^data\.source=local needs data\.train_files; ", _local(corpus, tokenizer_path, train_files=None))
    refused(ValueError, r"^data\.source=tokens needs data\.tokens_dir; ", C4DataModule("tokens"))
    refused(ValueError, r"^data\.shuffle_block=0 must be", _local(corpus, tokenizer_path, shuffle_block=0))
    refused(ValueError, r"^data\.max_bad_line_share=7 must lie between 0 and 1$", _local(corpus, tokenizer_path, max_bad_line_share=7))
    refused(ValueError, r"^data\.validation_fraction must lie", _local(corpus, tokenizer_path, validation_fraction=0.0))
    refused(
        FileNotFoundError,
        r"^data\.train_files: no file matches '.*none-\*'",
        _local(corpus, tokenizer_path, train_files=f"{corpus}/none-*"),
    )
    refused(
        FileNotFoundError, r"^data\.validation_files|^validation_files: no file", _local(corpus, tokenizer_path, validation_files="none-*")
    )
    refused(FileNotFoundError, r"^no tokenizer file .*none\.json: ", _local(corpus, str(tmp_path / "none.json")))
    refused(
        ValueError,
        r"^data\.vocab_size=512, but .*tokenizer\.json has 400 tokens; correct one",
        _local(corpus, tokenizer_path, vocab_size=512),
    )
    refused(ValueError, r"is given both for training and", _local(corpus, tokenizer_path, validation_files=str(corpus / "train-0*")))
    refused(FileNotFoundError, r"^data\.tokens_dir: no manifest\.json in ", C4DataModule("tokens", tokens_dir=str(tmp_path)))
    refused(ValueError, r"has 400 tokens; correct one", C4DataModule("tokens", tokens_dir=str(tokens_dir), vocab_size=401))
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    refused(
        ValueError, r"^data\.train_files: every file that matches '.*' is empty", _local(corpus, tokenizer_path, train_files=str(empty))
    )
    book = write_lines(tmp_path / "book.txt", [b"no JSON here"] * 80)
    refused(
        ValueError, r"^data\.train_files: none of the first 80 lines of .*book\.txt", _local(corpus, tokenizer_path, train_files=str(book))
    )
    bytes_ = write_lines(tmp_path / "latin.jsonl", [*json_lines(texts[:9]), '{"text": "caf\u00e9"}'.encode("latin-1")])
    refused(ValueError, r"1 no UTF-8\), the first at .*latin\.jsonl:10; ", _local(corpus, tokenizer_path, train_files=str(bytes_)))
    (tmp_path / "file").touch()
    cache = C4DataModule(cache_dir=str(tmp_path / "file" / "x"))
    refused(NotADirectoryError, r"^the built-in text's folder \(data\.cache_dir\) .* is a file", cache)


def test_nothing_is_written_by_check(tmp_path: Path) -> None:
    C4DataModule(cache_dir=str(tmp_path / "cache")).check()
    assert not list(tmp_path.iterdir())


def test_too_little_text_for_validation(corpus: Path, tokenizer_path: str) -> None:
    data = _local(corpus, tokenizer_path, seq_len=100_000)
    with pytest.raises(
        ValueError, match=r"validation tokens are too few for one window of seq_len=100000; raise data\.validation_fraction"
    ):
        data.setup()


def test_loaders_before_setup_say_so(corpus: Path, tokenizer_path: str) -> None:
    with pytest.raises(ValueError, match=r"call prepare_data\(\) and setup\(\) first"):
        _local(corpus, tokenizer_path).train_dataloader()


def test_bad_lines_met_in_training_name_the_file(corpus: Path, tokenizer_path: str, tmp_path: Path, write_lines, json_lines, texts) -> None:
    # Behind the thousand lines that are looked at before anything is built.
    lines = [*json_lines(texts) * 12, *[json.dumps({"url": "no text"}).encode()] * 30, *json_lines(texts)]
    path = write_lines(tmp_path / "part.jsonl.gz", lines)
    data = _local(corpus, tokenizer_path, train_files=str(path), validation_files=str(corpus / "validation*"), num_workers=1, seq_len=256)
    data.prepare_data()
    data.setup()
    with pytest.raises(ValueError, match=r"too many bad lines: skipped 11 of 1,091 lines .*part\.jsonl\.gz:1081"):
        list(itertools.islice(data.train_dataloader(), 2_000))
