"""Decoding: one state of constant size, filters that keep what they should, the same tokens for the same seed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import assert_same

from mmrec.generate import Sampling, filtered_logits, generate, read_prompt
from mmrec.model import MMRecModel

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


@pytest.fixture(scope="module")
def model() -> MMRecModel:
    torch.manual_seed(0)
    # Larger weights than at the start of training, so that the most likely token depends on what was read.
    return MMRecModel(
        vocab_size=50, model_dim=32, num_layers=2, num_heads=2, use_uboo=False, initializer_range=0.3, embedding_scale=1
    ).eval()


def tokens(model: MMRecModel, prompt: list[int] = PROMPT, **options: object) -> list[int]:
    stop_id, chunk_size = options.pop("stop_id", None), options.pop("chunk_size", 512)
    return list(generate(model, prompt, Sampling(**options), stop_id=stop_id, chunk_size=chunk_size))


@pytest.mark.parametrize("chunk_size", [1, 4, 10, 11, 512])
def test_a_prompt_read_in_pieces_gives_the_logits_of_the_whole(model: MMRecModel, chunk_size: int) -> None:
    logits, state = read_prompt(model, PROMPT, chunk_size)
    whole, last = model(torch.tensor([PROMPT]), return_state=True)
    assert_same(logits, whole[:, -1], what="logits")
    for found, expected in zip(state, last, strict=True):
        assert_same(found.h, expected.h, what="h")
        assert_same(found.M, expected.M, what="M")


def test_reading_a_prompt_computes_the_logits_of_its_last_token_only(model: MMRecModel) -> None:
    sizes: list[int] = []
    hook = model.head.register_forward_hook(lambda module, inputs, logits: sizes.append(logits.numel()))
    read_prompt(model, PROMPT, 4)
    hook.remove()
    assert sizes == [model.config.vocab_size]


def test_greedy_decoding_is_what_running_the_whole_text_again_gives(model: MMRecModel) -> None:
    text = list(PROMPT)
    for _ in range(12):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    assert tokens(model, temperature=0.0, max_new_tokens=12) == text[len(PROMPT) :]
    assert len(set(text[len(PROMPT) :])) > 1


def test_the_state_does_not_grow_with_the_text(model: MMRecModel) -> None:
    sizes = [sum(x.numel() for block in read_prompt(model, [1] * n, 7)[1] for x in (block.h, block.M)) for n in (1, 50)]
    assert sizes[0] == sizes[1] == model.state_bytes(1) // 4


def test_the_seed_decides(model: MMRecModel) -> None:
    torch.manual_seed(1)
    first = tokens(model, seed=5, max_new_tokens=20)
    torch.manual_seed(2)
    assert tokens(model, seed=5, max_new_tokens=20, chunk_size=3) == first
    assert tokens(model, seed=6, max_new_tokens=20) != first


def test_a_stop_token_ends_the_text_and_is_not_part_of_it(model: MMRecModel) -> None:
    free = tokens(model, temperature=0.0, max_new_tokens=12)
    stop = free[5]
    assert tokens(model, temperature=0.0, max_new_tokens=12, stop_id=stop) == free[: free.index(stop)]


def test_top_k_and_top_p_keep_the_most_likely_tokens() -> None:
    probabilities = torch.tensor([[0.05, 0.4, 0.1, 0.3, 0.15]])

    def kept(**options: object) -> list[int]:
        return filtered_logits(probabilities.log(), Sampling(**options)).isfinite()[0].nonzero().flatten().tolist()

    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=2) == [1, 3]
    assert kept(top_k=99) == [0, 1, 2, 3, 4]
    assert kept(top_p=0.01) == [1]  # never nothing
    assert kept(top_p=0.6) == [1, 3]
    assert kept(top_p=0.75) == [1, 3, 4]
    assert kept(top_p=0.99, top_k=3) == [1, 3, 4]


def test_the_temperature_sharpens() -> None:
    logits = torch.tensor([[1.0, 2.0]])
    cold = filtered_logits(logits, Sampling(temperature=0.5)).softmax(-1)
    torch.testing.assert_close(cold, (logits * 2).softmax(-1))


def test_samples_follow_the_probabilities(model: MMRecModel) -> None:
    logits, _ = read_prompt(model, PROMPT)
    expected = logits.softmax(-1)[0]
    drawn = torch.tensor([tokens(model, seed=seed, max_new_tokens=1)[0] for seed in range(300)])
    likely = int(expected.argmax())
    share = (drawn == likely).float().mean().item()
    error = (expected[likely] * (1 - expected[likely]) / 300).sqrt().item()
    assert abs(share - expected[likely].item()) < 5 * error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_bad_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


@pytest.mark.parametrize(("prompt", "message"), [([], "the prompt is empty"), ([50], "token id 50 in the prompt is out of range")])
def test_bad_prompts_are_refused(model: MMRecModel, prompt: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokens(model, prompt)


def test_neither_the_network_nor_decoding_needs_triton_on_a_cpu() -> None:
    """Triton exists on Linux alone."""
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "from mmrec.generate import Sampling, generate\n"
        "from mmrec.model import MMRecModel\n"
        "model = MMRecModel(vocab_size=9, model_dim=16, num_layers=1, num_heads=2)\n"
        "model.loss({'input_ids': model.embedding.weight.new_zeros(1, 4).long(), 'labels': model.embedding.weight.new_zeros(1, 4).long()})"
        ".loss.backward()\n"
        "print(len(list(generate(model.eval(), [1, 2], Sampling(max_new_tokens=3)))))\n"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    assert (answer.stdout, answer.returncode) == ("3\n", 0), answer.stderr
