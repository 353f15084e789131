"""Decoding by replayed graphs, on a GPU."""

from typing import Any

import pytest
import torch
from decoding_cases import decoded, network, random_state, stepped, tokens
from support import assert_same, relative_error

from mmrec.decoding import Decoder
from mmrec.decoding.tiles import overridden
from mmrec.generate import Sampling, filtered_logits, generate, read_prompt
from mmrec.model import MMRecModel

NOISE = 2  # two bf16 computations round at different places: neither is always the nearer
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

NETWORKS: dict[str, dict[str, Any]] = {
    "wide heads": {"model_dim": 1024, "num_heads": 2, "ffn_dim": 2816, "initializer_range": 0.02},
    "D no power of two": {"model_dim": 768, "num_heads": 6, "pe_dim": 192, "ffn_dim": 2048, "initializer_range": 0.02},
    "DPG": {"model_dim": 512, "num_heads": 8, "use_dpg": True, "initializer_range": 0.03},
    "windows": {"model_dim": 1024, "num_heads": 8, "window_every": 2, "window": 512, "initializer_range": 0.02},
    "windows, wide heads": {"model_dim": 1024, "num_heads": 2, "window_every": 1, "window": 100, "initializer_range": 0.02},
    "no convolution": {"model_dim": 512, "num_heads": 4, "window_every": 1, "window": 100, "window_conv": 1, "initializer_range": 0.02},
    "odd windows": {"model_dim": 88, "num_heads": 2, "window_every": 1, "window": 7, "window_conv": 3, "initializer_range": 0.1},
    "odd": {"model_dim": 88, "num_heads": 2, "pe_dim": 8, "initializer_range": 0.1},
}


def on_gpu(dtype: torch.dtype, **options: Any) -> MMRecModel:
    return network(num_layers=3, **options).to("cuda", dtype)


@pytest.mark.parametrize("early", [0, 1], ids=["waiting", "early"])
@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_fp32_steps_are_the_networks_own(name: str, batch: int, early: int) -> None:
    model = on_gpu(torch.float32, **NETWORKS[name])
    state, given = random_state(model, batch), tokens(model, batch, 20)
    exact = MMRecModel(model.config).double().cuda()
    exact.load_state_dict(model.state_dict())
    expected, expected_state = stepped(exact, state, given)
    with overridden(PDL=early):
        decoder = Decoder(model, batch, fused=True)
    logits, after = decoded(decoder, state, given)
    for found, wanted in zip(logits, expected, strict=True):
        assert_same(found, wanted, torch.float32)
    for found, wanted in zip(after, expected_state, strict=True):
        for ours, theirs in zip(found.kept(), wanted.kept(), strict=True):
            assert_same(ours, theirs, torch.float32)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_bf16_is_as_near_to_the_truth_as_the_networks_own_step(name: str, batch: int) -> None:
    model = on_gpu(torch.bfloat16, **NETWORKS[name])
    exact = MMRecModel(model.config).double().cuda()
    exact.load_state_dict(model.state_dict())
    state, given = random_state(model, batch), tokens(model, batch, 10)
    truth, true_state = stepped(exact, state, given)
    own, own_state = stepped(model, state, given)
    logits, after = decoded(Decoder(model, batch, fused=True), state, given)
    for found, ordinary, wanted in zip(logits, own, truth, strict=True):
        assert relative_error(found, wanted) < max(NOISE * relative_error(ordinary, wanted), 1e-2)
    for found, ordinary, wanted in zip(after, own_state, true_state, strict=True):
        for ours, steps, theirs in zip(found.kept(), ordinary.kept(), wanted.kept(), strict=True):
            assert relative_error(ours, theirs) < max(NOISE * relative_error(steps, theirs), 1e-2)


@pytest.mark.parametrize("early", [0, 1], ids=["waiting", "early"])
def test_a_window_from_its_first_token_through_many_rounds(early: int) -> None:
    """The capture's warm-ups have left nothing, and a replay finds the places that the one before has left."""
    model = on_gpu(torch.float32, model_dim=512, num_heads=4, window_every=2, window=37)
    state, given = model.init_state(2), tokens(model, 2, 300)
    expected, expected_state = stepped(model, state, given)
    with overridden(PDL=early), Decoder(model, 2, fused=True) as decoder:
        for own, first in zip(decoder.state, state, strict=True):
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(own.kept(), first.kept(), strict=True))
        found = torch.stack([decoder.step(token).clone() for token in given])
        assert_same(found, torch.stack(expected), limit=5e-5)  # against fp32, which rounds as often
        for own, wanted in zip(decoder.state, expected_state, strict=True):
            for ours, theirs in zip(own.kept(), wanted.kept(), strict=True):
                assert_same(ours, theirs, limit=5e-5)


@pytest.mark.parametrize("options", [{"use_hem": False}, {}, {"window_every": 2, "window": 32}], ids=["six", "large batch", "windows"])
def test_where_the_kernels_do_not_run_the_networks_own_step_is_replayed(options: dict[str, Any]) -> None:
    model = on_gpu(torch.bfloat16, model_dim=256, num_heads=2, **options)
    state, given = random_state(model, 8), tokens(model, 8, 4)
    decoder = Decoder(model, 8)
    assert not decoder.fused
    expected, expected_state = stepped(model, state, given)
    logits, after = decoded(decoder, state, given)
    assert_same(torch.stack(logits), torch.stack(expected))
    assert_same(after[-1].M, expected_state[-1].M, torch.bfloat16)


def test_the_same_tokens_every_time_and_those_of_single_steps() -> None:
    model = on_gpu(torch.float32, model_dim=512, num_heads=4)
    prompt = list(range(40))
    sampling = Sampling(temperature=0.9, top_k=20, top_p=0.95, seed=3, max_new_tokens=60)
    first = list(generate(model, prompt, sampling))
    assert list(generate(model, prompt, sampling)) == first
    with torch.inference_mode():
        logits, state = read_prompt(model, prompt)
        generator = torch.Generator("cuda").manual_seed(3)
        wanted = []
        for _ in range(60):
            token = torch.multinomial(filtered_logits(logits, sampling).softmax(-1), 1, generator=generator)[:, 0]
            wanted.append(int(token))
            logits, state = model.step(token, state)
    assert first == wanted


def test_greedy_replays_need_no_host() -> None:
    model = on_gpu(torch.bfloat16, model_dim=512, num_heads=4)
    with Decoder(model, greedy=True) as decoder:
        decoder.load(random_state(model, 1))
        decoder.advance()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(5):
                decoder.advance()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert 0 <= int(decoder.tokens) < model.config.vocab_size


def test_changed_weights_count_and_nothing_is_left_behind() -> None:
    model = on_gpu(torch.float32, model_dim=512, num_heads=4)
    stepped(model, random_state(model, 1), tokens(model, 1, 1))  # libraries take their workspaces
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with Decoder(model) as decoder:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.05)
        state, given = random_state(model, 1), tokens(model, 1, 1)
        assert_same(decoded(decoder, state, given)[0][0], stepped(model, state, given)[0][0], limit=5e-5)
    del decoder, state, given
    assert torch.cuda.memory_allocated() <= before + 2**20
