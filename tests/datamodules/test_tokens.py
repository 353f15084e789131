import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from datamodules.tokenizer import load_tokenizer
from datamodules.tokens import TokenWindows, load_manifest, verify_checksums

SEQ_LEN = 48


@pytest.fixture
def stream(texts: list[str], tokenizer_path: str) -> np.ndarray:
    """The training stream, document by document."""
    tokenizer = load_tokenizer(tokenizer_path)
    return np.asarray([token for text in texts[:80] for token in (*tokenizer.encode(text), tokenizer.eod_id)])


def test_windows_are_cut_from_the_one_stream_also_across_shards(tokens_dir: Path, stream: np.ndarray) -> None:
    windows = TokenWindows(tokens_dir, "train", SEQ_LEN, reset_at_documents=True)
    assert len(load_manifest(tokens_dir)["splits"]["train"]["shards"]) > 3
    assert windows.num_windows == (len(stream) - 1) // SEQ_LEN
    batch = windows.batch(np.arange(windows.num_windows))
    used = windows.num_windows * SEQ_LEN
    assert batch["input_ids"].dtype == batch["labels"].dtype == np.int64
    assert (batch["input_ids"].ravel() == stream[:used]).all()
    assert (batch["labels"].ravel() == stream[1 : used + 1]).all()
    starts = np.concatenate([[True], stream[:-1] == 0])
    assert batch["reset"].dtype == np.bool_
    assert (batch["reset"].ravel() == starts[:used]).all()
    assert "reset" not in TokenWindows(tokens_dir, "train", SEQ_LEN).batch(np.arange(2))


@pytest.fixture
def damaged(tokens_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tokens_dir, tmp_path / "tokens"))


def test_a_sound_folder_passes(damaged: Path) -> None:
    verify_checksums(damaged)


def test_an_id_out_of_range_is_refused_at_load(damaged: Path) -> None:
    with pytest.raises(ValueError, match=r"^token id \d+ in .*train-00000\.bin is out of range for a vocabulary of 300: "):
        load_manifest(damaged, vocab_size=300)


def test_an_id_out_of_range_that_the_manifest_hides_is_refused_when_read(damaged: Path) -> None:
    tokens = np.fromfile(damaged / "train-00001.bin", dtype="<u2")
    tokens[10] = 65_000
    tokens.tofile(damaged / "train-00001.bin")
    windows = TokenWindows(damaged, "train", SEQ_LEN)
    with pytest.raises(ValueError, match=r"^token id 65000 in .*train-00001\.bin is out of range for a vocabulary of 400"):
        windows.batch(np.arange(windows.num_windows))
    with pytest.raises(ValueError, match=r"train-00001\.bin does not match its SHA-256"):
        verify_checksums(damaged)


def test_a_shard_of_another_size_or_missing(damaged: Path) -> None:
    with open(damaged / "train-00002.bin", "ab") as file:
        file.write(b"\0\0")
    with pytest.raises(ValueError, match=r"train-00002\.bin has [\d,]+ bytes, its manifest says"):
        load_manifest(damaged)
    (damaged / "train-00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"^token shard .*train-00002\.bin is missing"):
        load_manifest(damaged)


def test_bad_manifests(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^data\.tokens_dir: no manifest\.json in .*; write one with"):
        load_manifest(tmp_path / "nowhere")
    manifest = damaged / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(ValueError, match="has format 99"):
        load_manifest(damaged)
    for bad in ("{", "[]", "{}"):
        manifest.write_text(bad)
        with pytest.raises(ValueError, match=r"manifest\.json is damaged \("):
            load_manifest(damaged)
    manifest.unlink()
    with pytest.raises(FileNotFoundError, match="its preparation did not finish: run"):
        load_manifest(damaged)


def test_too_few_tokens_for_a_window_and_unknown_splits(tokens_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"has [\d,]+ tokens, too few for one window of seq_len=1000000"):
        TokenWindows(tokens_dir, "train", 1_000_000)
    with pytest.raises(ValueError, match=r"has no split 'test', only train, validation"):
        TokenWindows(tokens_dir, "test", 8)
