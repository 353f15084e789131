import numpy as np
import pytest
import torch

from datamodules import RecallDataModule
from datamodules.recall_tasks import _smallest


def _batch(**settings) -> dict[str, torch.Tensor]:
    data = RecallDataModule(batch_size=50, **settings)
    data.prepare_data()
    data.setup()
    return next(iter(data.train_dataloader()))


def test_each_query_asks_for_the_value_that_followed_its_key() -> None:
    batch = _batch(task="mqar", seq_len=64, vocab_size=40, num_pairs=8)
    for inputs, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        pairs = dict(zip(inputs[0:16:2], inputs[1:16:2], strict=True))
        assert len(pairs) == 8
        assert all(1 <= key < 20 <= value < 40 for key, value in pairs.items())
        assert labels[:16] == [-1] * 16
        asked = {token: label for token, label in zip(inputs[16:], labels[16:], strict=True) if label != -1}
        assert asked == pairs
        assert all(token == 0 for token, label in zip(inputs[16:], labels[16:], strict=True) if label == -1)


def test_short_gaps_are_likelier() -> None:
    batch = _batch(task="mqar", seq_len=256, vocab_size=64, num_pairs=4)
    slots = (batch["labels"] != -1).nonzero()[:, 1] - 8
    assert slots.float().median() < 248 / 4


def test_selective_copying_returns_the_tokens_in_order() -> None:
    batch = _batch(task="selective_copy", seq_len=40, vocab_size=12, num_pairs=6)
    for inputs, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        assert labels[34:] == [token for token in inputs[:34] if token != 0]
        assert inputs[34:] == [1] * 6
        assert labels[:34] == [-1] * 34


def test_training_examples_take_their_numbers_of_pairs_in_turn() -> None:
    data = RecallDataModule(seq_len=48, vocab_size=64, num_pairs=9, train_pairs=[2, 5], train_examples=8, batch_size=8, shuffle=False)
    data.setup()
    asked = [(batch["labels"] != -1).sum(1).tolist() for batch in (next(iter(data.train_dataloader())), next(iter(data.val_dataloader())))]
    assert asked == [[2, 5] * 4, [9] * 8]


@pytest.mark.parametrize("task", ["mqar", "selective_copy"])
def test_examples_depend_on_seed_and_number_only(task: str) -> None:
    first, again, other = (_batch(task=task, seed=seed, seq_len=96, num_pairs=8) for seed in (1, 1, 2))
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert not torch.equal(first["input_ids"], other["input_ids"])


@pytest.mark.parametrize("task", ["mqar", "selective_copy"])
def test_validation_shares_no_example_with_training(task: str) -> None:
    data = RecallDataModule(task=task, train_examples=600, validation_examples=200, batch_size=100, seq_len=96)
    data.setup()
    iterator = iter(data.train_dataloader())
    train = {tuple(row) for _ in range(6) for row in next(iterator)["input_ids"].tolist()}
    validation = {tuple(row) for batch in data.val_dataloader() for row in batch["input_ids"].tolist()}
    assert (len(train), len(validation)) == (600, 200)
    assert not train & validation


def test_it_is_the_same_on_every_machine() -> None:
    data = RecallDataModule(seq_len=16, num_pairs=3, vocab_size=20, batch_size=1, shuffle=False)
    data.setup()
    assert next(iter(data.train_dataloader()))["input_ids"].tolist() == [[1, 11, 3, 17, 2, 11, 2, 0, 3, 0, 0, 0, 1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seq_len": 0}, r"^data\.seq_len=0 must be at least 1$"),
        ({"seq_len": 40}, r"^data\.seq_len=40 is too short for 16 pairs: give at least 48$"),
        ({"vocab_size": 33}, r"^data\.vocab_size=33 is too small for 16 pairs: give at least 34$"),
        ({"train_pairs": []}, r"^data\.train_pairs=\[\] must be whole numbers of at least 1, or null for num_pairs$"),
        ({"train_pairs": [4, 0]}, r"^data\.train_pairs=\[4, 0\] must be whole numbers of at least 1"),
        ({"train_pairs": [2.5]}, r"^data\.train_pairs=\[2\.5\] must be whole numbers of at least 1"),
        ({"train_pairs": [4, 90]}, r"^data\.seq_len=256 is too short for 90 pairs: give at least 270$"),
        ({"num_pairs": 0}, r"^data\.num_pairs=0 must be at least 1$"),
        ({"task": "selective_copy", "seq_len": 30}, r"^data\.seq_len=30 is too short to copy 16 tokens: give at least 32$"),
        ({"task": "selective_copy", "vocab_size": 2}, r"^data\.vocab_size=2 is too small for selective copying: give at least 3$"),
        ({"task": "other"}, r"^data\.task='other' is unknown; choose mqar or selective_copy$"),
        ({"validation_examples": 0}, r"^data\.validation_examples=0 must be at least 1$"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecallDataModule(**settings).check()


def test_the_head_of_a_sort_is_that_of_the_whole_sort() -> None:
    values = np.random.default_rng(0).integers(0, 50, 200).astype(np.float64)  # many are equal
    smallest = np.unique(values)[:3]
    for size in (1, int((values <= smallest[0]).sum()), int((values <= smallest[2]).sum()), 200):
        whole = np.argsort(values, kind="stable")[:size]
        assert values[_smallest(values, size)].tolist() == values[whole].tolist()
    draws = np.random.default_rng(1).random(300)
    assert _smallest(draws, 40).tolist() == np.argsort(draws, kind="stable")[:40].tolist()
