import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.documents import LineCounts, is_validation
from datamodules.loader import ResumableDataLoader
from datamodules.packing import ArrayWindows, PackedBatches, StreamOptions
from datamodules.text_source import Cursor, DocumentStream, HubShards, LocalShards
from datamodules.tokenizer import load_tokenizer

OPTIONS = StreamOptions(
    seq_len=32,
    batch_size=3,
    seed=5,
    shuffle=True,
    shuffle_block=8,
    validation_fraction=0.0,
    max_bad_line_share=0.01,
    reset_at_documents=True,
)


@pytest.fixture
def shards(corpus: Path) -> LocalShards:
    return LocalShards(sorted(str(path) for path in corpus.glob("train-*")))


def _epoch(shards, consumer: int, num_consumers: int, *, epoch: int = 0, shuffle: bool = True, fraction: float = 0.0) -> list[str]:
    """The documents of one consumer's one epoch."""
    stream = DocumentStream(
        shards, consumer=consumer, num_consumers=num_consumers, seed=1, shuffle=shuffle, shuffle_block=4, validation_fraction=fraction,
        max_bad_line_share=0.01,
    )  # fmt: skip
    found = []
    for block in stream.blocks(Cursor(epoch=epoch), LineCounts()):
        if block.start.epoch > epoch:
            return found
        found.extend(block.texts)
    raise AssertionError("the stream ended")


@pytest.mark.parametrize("num_consumers", [1, 2, 3, 4, 5, 7, 12])
def test_consumers_are_disjoint_and_complete_whatever_their_number(shards: LocalShards, texts: list[str], num_consumers: int) -> None:
    """Five shards among more and fewer consumers. Blocks may reach into the next epoch, so a little of it is cut off here."""
    seen: list[str] = []
    for consumer in range(num_consumers):
        stream = DocumentStream(
            shards, consumer=consumer, num_consumers=num_consumers, seed=1, shuffle=True, shuffle_block=1, validation_fraction=0.0,
            max_bad_line_share=0.01,
        )  # fmt: skip
        places = []
        for place, text in stream._documents(Cursor(), LineCounts()):
            if place.epoch == 1:
                break
            places.append(place)
            seen.append(text)
        assert len(places) == len(set(places)) > 0
    assert sorted(seen) == sorted(texts[:80])


def test_epochs_differ_in_order_and_seeds_choose_it(shards: LocalShards) -> None:
    first, again, second = _epoch(shards, 0, 1), _epoch(shards, 0, 1), _epoch(shards, 0, 1, epoch=1)
    assert first == again
    assert first != second
    assert len(set(first) & set(second)) > 60


def test_more_consumers_than_documents_is_refused(tmp_path: Path, write_lines, json_lines, tokenizer_path: str) -> None:
    shards = LocalShards([str(write_lines(tmp_path / "two.jsonl", json_lines(["one", "two"])))])
    dataset = PackedBatches(shards, tokenizer_path, OPTIONS, rank=2, world_size=3)
    with pytest.raises(ValueError, match=r"^the training files hold no document for consumer 3 of 3 "):
        next(iter(dataset))


def test_without_shuffling_the_windows_are_the_stream(shards: LocalShards, texts: list[str], tokenizer_path: str) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    stream = np.asarray([token for text in texts[:80] for token in (*tokenizer.encode(text), tokenizer.eod_id)])
    dataset = PackedBatches(shards, tokenizer_path, replace(OPTIONS, shuffle=False), rank=0, world_size=1)
    iterator = iter(dataset)
    batches = [next(iterator) for _ in range(len(stream) // (32 * 3) + 2)]  # into the second epoch
    tokens = np.concatenate([stream, stream])
    inputs, labels, reset = (torch.cat([batch[name].flatten() for batch in batches]).numpy() for name in ("input_ids", "labels", "reset"))
    assert batches[0]["input_ids"].shape == (3, 32)
    assert len(inputs) > len(stream)
    assert (inputs == tokens[: len(inputs)]).all()
    assert (labels == tokens[1 : len(inputs) + 1]).all()
    assert (reset == np.concatenate([[True], tokens[: len(inputs) - 1] == tokenizer.eod_id])).all()


def test_a_document_longer_than_everything_else(tmp_path: Path, write_lines, json_lines, texts: list[str], tokenizer_path: str) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    long = "\n".join(texts)
    path = write_lines(tmp_path / "long.jsonl", json_lines(["short", long, "end"]))
    dataset = PackedBatches(LocalShards([str(path)]), tokenizer_path, replace(OPTIONS, shuffle=False, batch_size=1), rank=0, world_size=1)
    expected = [*tokenizer.encode("short"), tokenizer.eod_id, *tokenizer.encode(long), tokenizer.eod_id]
    iterator = iter(dataset)
    found: list[int] = []
    while len(found) < len(expected):
        found.extend(next(iterator)["input_ids"].flatten().tolist())
    assert found[: len(expected)] == expected
    state = iterator.state_dict()
    resumed = iter(dataset)
    resumed.load_state_dict(state)
    assert torch.equal(next(resumed)["input_ids"], next(iterator)["input_ids"])


@pytest.mark.parametrize(("rank", "world_size", "seq_len"), [(0, 1, 32), (1, 2, 7), (2, 3, 500)])
def test_every_state_continues_to_the_bit(shards: LocalShards, tokenizer_path: str, rank: int, world_size: int, seq_len: int) -> None:
    dataset = PackedBatches(shards, tokenizer_path, replace(OPTIONS, seq_len=seq_len), rank=rank, world_size=world_size)
    iterator = iter(dataset)
    states, batches = [iterator.state_dict()], []
    for _ in range(40):
        batches.append(next(iterator))
        states.append(iterator.state_dict())
    if seq_len == 500:
        assert states[-1]["block"]["epoch"] > 0
    for step in (0, 1, 7, 23, 38):
        resumed = iter(dataset)
        resumed.load_state_dict(states[step])
        for expected in batches[step : step + 2]:
            found = next(resumed)
            assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert resumed.state_dict() == states[step + 2]


def test_bad_lines_are_reported_and_counted_once_also_after_a_resume(
    tmp_path: Path, write_lines, json_lines, texts, tokenizer_path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = json_lines(texts)
    for place in (3, 30, 60):
        lines.insert(place, b'{"url": "no text"}')
    path = write_lines(tmp_path / "part.jsonl", lines)
    dataset = PackedBatches(LocalShards([str(path)]), tokenizer_path, replace(OPTIONS, max_bad_line_share=0.5), rank=0, world_size=1)
    iterator = iter(dataset)
    while iterator.state_dict()["block"]["epoch"] < 2:
        next(iterator)
    assert caplog.messages[0] == f'after {path}: skipped 3 of 93 lines (3.23 %: 3 without a "text" string), the first at {path}:4'
    resumed = iter(dataset)
    resumed.load_state_dict(iterator.state_dict())
    next(resumed), next(iterator)
    assert resumed.counts == iterator.counts
    assert iterator.counts.no_text in (6, 7)
    strict = iter(PackedBatches(LocalShards([str(path)]), tokenizer_path, OPTIONS, rank=0, world_size=1))
    with pytest.raises(ValueError, match=r"^too many bad lines: skipped 3 of 93 lines .*part\.jsonl:4; "):
        list(strict)


def test_validation_documents_are_left_out(shards: LocalShards, texts: list[str]) -> None:
    train = _epoch(shards, 0, 1, fraction=0.3)
    assert 0 < len(set(train)) < 75
    assert not any(is_validation(text, 0.3) for text in train)
    assert set(train) <= set(texts[:80])


def test_windows_of_an_array() -> None:
    tokens = np.asarray([5, 6, 0, 7, 8, 0, 9, 4, 3])
    windows = ArrayWindows(tokens, 3, 0, True)
    assert windows.num_windows == 2
    batch = windows.batch(np.asarray([1, 0]))
    assert batch["input_ids"].tolist() == [[7, 8, 0], [5, 6, 0]]
    assert batch["labels"].tolist() == [[8, 0, 9], [6, 0, 7]]
    assert batch["reset"].tolist() == [[True, False, False], [True, False, False]]


def test_a_dataset_of_the_hub_is_read_shard_by_shard(corpus: Path, texts: list[str], tmp_path: Path, write_lines, json_lines) -> None:
    """A local folder in the hub's form: the same code as for allenai/c4, without the network."""
    for number, first in enumerate((0, 25, 55)):
        write_lines(tmp_path / f"train-{number}.jsonl", json_lines(texts[first : first + 25]))
    shards = HubShards(str(tmp_path), None, "train")
    assert shards.num_shards == 3
    read = [text for shard in range(3) for _, (text, _) in shards.read(shard, 0, 1, 0)]
    assert read == [*texts[:25], *texts[25:50], *texts[55:80]]
    assert list(shards.read(1, 4, 3, 1)) == [entry for entry in list(shards.read(1, 0, 1, 0)) if entry[0] >= 4 and entry[0] % 3 == 1]
    with pytest.raises(ValueError, match=r"^data\.hub_dataset: cannot load '.*none' \(config None, split 'train'\): .*; check the name"):
        HubShards(str(tmp_path / "none"), None, "train")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_and_workers_of_real_loaders_are_disjoint_and_complete(
    shards: LocalShards, texts: list[str], tokenizer_path: str, num_workers: int
) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    consumers: list[list[str]] = []
    for rank in range(2):
        dataset = PackedBatches(shards, tokenizer_path, replace(OPTIONS, shuffle=False, seq_len=400), rank=rank, world_size=2)
        iterator = iter(ResumableDataLoader(dataset, num_workers=num_workers, rank=rank, world_size=2, identity={}))
        streams: list[list[int]] = [[] for _ in range(max(1, num_workers))]
        for number in range(60):
            streams[number % len(streams)].extend(next(iterator)["input_ids"].flatten().tolist())
        for stream in streams:
            documents = " ".join(map(str, stream)).split(f" {tokenizer.eod_id} ")
            decoded = [tokenizer.decode([int(token) for token in document.split()]) for document in documents]
            second_epoch = decoded.index(decoded[0], 1)
            consumers.append(decoded[:second_epoch])
    assert len(consumers) == 2 * max(1, num_workers)
    assert sorted(itertools.chain(*consumers)) == sorted(texts[:80])
