"""The carried state: where it starts, how a history is cut, how single sequences are forgotten."""

from dataclasses import replace

import pytest
import torch
from support import assert_same

from mmrec.config import MMRecConfig
from mmrec.core.memory import detach_state, init_state, reset_state, state_bytes
from mmrec.model import MMRecModel

CONFIG = MMRecConfig(vocab_size=11, model_dim=16, num_layers=2, num_heads=2, pe_dim=4, window_every=2, window=5)
WITHOUT = replace(CONFIG, window_conv=1)
TOKENS = torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(0))
configs = pytest.mark.parametrize("config", [CONFIG, WITHOUT], ids=["convolution", "none"])


def network(config: MMRecConfig) -> MMRecModel:
    """Its convolution's gains drawn: at the start it reads the token alone."""
    model = MMRecModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_gain", "k_gain")):
                parameter.normal_()
    return model


@configs
def test_it_starts_at_nothing_read(config: MMRecConfig) -> None:
    model = network(config)
    fresh = [init_state(config, 3, layer_index=index) for index in range(2)]
    assert_same(model(TOKENS, state=fresh), model(TOKENS))
    assert fresh[0].window is None
    assert fresh[1].M.numel() == 0
    assert (fresh[1].recent is None) == (config.window_conv == 1)
    assert sum(tensor.nbytes for state in fresh for tensor in state.kept()) == state_bytes(config, 3)


@configs
def test_a_detached_state_has_the_values_and_no_history(config: MMRecConfig) -> None:
    model = network(config)
    _, _, states = model(TOKENS, return_auxiliary_loss=True, return_state=True)
    cut = [detach_state(state) for state in states]
    for before, after in zip(states, cut, strict=True):
        assert len(before.kept()) == len(after.kept()) == (2 if before.window is None else 6 if before.recent is None else 7)
        for with_history, without in zip((before.planning, *before.kept()), (after.planning, *after.kept()), strict=True):
            assert with_history.requires_grad == (with_history.is_floating_point() and with_history.numel() > 0)
            assert not without.requires_grad
            assert torch.equal(with_history, without)


@configs
def test_a_reset_row_reads_as_if_it_were_new(config: MMRecConfig) -> None:
    model = network(config)
    _, states = model(TOKENS, return_state=True)
    forgotten = [reset_state(state, torch.tensor([False, True, False])) for state in states]
    logits = model(TOKENS, state=forgotten)
    assert torch.allclose(logits[1], model(TOKENS)[1])
    assert torch.equal(logits[0], model(TOKENS, state=states)[0])
    assert not torch.allclose(logits[0], model(TOKENS)[0])


def test_without_the_last_tokens_a_window_reads_otherwise() -> None:
    model = network(CONFIG)
    _, (first, second) = model(TOKENS, return_state=True)
    forgotten = model(TOKENS, state=[first, second._replace(recent=torch.zeros_like(second.recent))])
    assert not torch.allclose(forgotten[:, 0], model(TOKENS, state=[first, second])[:, 0])
