"""The carried state: where it starts, how a history is cut, how single sequences are forgotten."""

import torch
from support import assert_same

from mmrec.config import MMRecConfig
from mmrec.core.memory import detach_state, init_state, reset_state, state_bytes
from mmrec.model import MMRecModel

CONFIG = MMRecConfig(vocab_size=11, model_dim=16, num_layers=2, num_heads=2, pe_dim=4, window_every=2, window=5)
TOKENS = torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(0))


def test_it_starts_at_nothing_read() -> None:
    model = MMRecModel(CONFIG)
    fresh = [init_state(CONFIG, 3, layer_index=index) for index in range(2)]
    assert_same(model(TOKENS, state=fresh), model(TOKENS))
    assert fresh[0].window is None
    assert fresh[1].M.numel() == 0
    assert sum(tensor.nbytes for state in fresh for tensor in state.kept()) == state_bytes(CONFIG, 3)


def test_a_detached_state_has_the_values_and_no_history() -> None:
    model = MMRecModel(CONFIG)
    _, _, states = model(TOKENS, return_auxiliary_loss=True, return_state=True)
    cut = [detach_state(state) for state in states]
    for before, after in zip(states, cut, strict=True):
        assert len(before.kept()) == len(after.kept()) == (2 if before.window is None else 6)
        for with_history, without in zip((before.planning, *before.kept()), (after.planning, *after.kept()), strict=True):
            assert with_history.requires_grad == (with_history.is_floating_point() and with_history.numel() > 0)
            assert not without.requires_grad
            assert torch.equal(with_history, without)


def test_a_reset_row_reads_as_if_it_were_new() -> None:
    model = MMRecModel(CONFIG)
    _, states = model(TOKENS, return_state=True)
    forgotten = [reset_state(state, torch.tensor([False, True, False])) for state in states]
    logits = model(TOKENS, state=forgotten)
    assert torch.allclose(logits[1], model(TOKENS)[1])
    assert torch.equal(logits[0], model(TOKENS, state=states)[0])
    assert not torch.allclose(logits[0], model(TOKENS)[0])
