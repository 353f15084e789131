"""A window in a ring: what a state becomes there, and what is read back."""

import pytest
import torch

from mmrec.config import MMRecConfig
from mmrec.decoding.rings import Ring
from mmrec.ops.window_attention import WindowState

WIDTH = 6


def ring_of(window: int, dtype: torch.dtype = torch.float32, taps: int = 4) -> Ring:
    config = MMRecConfig(model_dim=2 * WIDTH, num_heads=2, window_every=1, window=window, window_conv=taps)
    return Ring(config, 3, dtype, torch.device("cpu"))


def some_state(window: int, unseen: int = 0) -> WindowState:
    tokens = (3, window - 1, 2)
    seen = torch.arange(window - 1).expand(3, -1) >= unseen
    return WindowState(torch.randn(*tokens, WIDTH), torch.randn(*tokens, WIDTH), -torch.rand(tokens), seen)


@pytest.mark.parametrize("window", [1, 2, 5])
def test_a_state_comes_back(window: int) -> None:
    ring, state = ring_of(window), some_state(window, unseen=1)
    ring.load(state)
    assert all(torch.equal(found, wanted) for found, wanted in zip(ring.state(), state, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("taps", [2, 3, 4])
def test_what_is_convolved_comes_back(taps: int, dtype: torch.dtype) -> None:
    ring = ring_of(5, dtype, taps)
    recent = torch.randn(3, taps - 1, 4 * WIDTH, dtype=dtype)
    ring.load(some_state(5), recent)
    found = ring.recent_tokens()
    assert found is not None
    assert torch.equal(found, recent)
    assert found.dtype == dtype
    ring.load(some_state(5))  # what nothing was read before
    assert not ring.recent_tokens().any()


def test_no_convolution_no_ring_of_it() -> None:
    ring = ring_of(5, taps=1)
    ring.load(some_state(5), None)
    ring.clear()
    assert ring.recent is ring.recent_position is ring.recent_tokens() is None


def test_the_oldest_comes_first_wherever_it_lies() -> None:
    ring = ring_of(4, taps=5)
    ring.k[..., 0] = torch.tensor([10.0, 11, 8, 9])
    ring.decay.zero_()
    ring.position.fill_(2)  # the slot of 8: the next token's
    state = ring.state()
    assert state.k[0, :, 0, 0].tolist() == [9, 10, 11]
    assert state.seen.all()
    ring.recent[..., 0] = torch.tensor([24.0, 20, 21, 22, 23])
    ring.recent_position.fill_(1)  # of its own: five slots, not four
    assert ring.recent_tokens()[0, :, 0].tolist() == [21, 22, 23, 24]


def test_decays_are_those_of_the_tokens_since() -> None:
    ring, state = ring_of(4), some_state(4, unseen=1)
    state.log_alpha[0, :, 0] = torch.tensor([-1.0, -2.0, -4.0])
    ring.load(state)
    assert ring.decay[0, 0].tolist() == [float("-inf"), float("-inf"), -4.0, 0.0]  # the next token's slot, one unseen, two seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_whole_multiples_of_64_bytes(dtype: torch.dtype) -> None:
    ring = ring_of(4, dtype)
    assert ring.k.stride(2) * dtype.itemsize == 64
    assert ring.k.dtype == ring.v.dtype == dtype
    assert ring.decay.dtype == torch.float32


def test_a_cleared_ring_is_a_new_one() -> None:
    ring, new = ring_of(4), ring_of(4)
    ring.load(some_state(4), torch.randn(3, 3, 4 * WIDTH))
    ring.position.fill_(3)
    ring.recent_position.fill_(2)
    ring.clear()
    for name in ("k", "v", "log_alpha", "decay", "position", "recent", "recent_position"):
        assert torch.equal(getattr(ring, name), getattr(new, name))
