"""The decoder on a CPU: the network's own step in the decoder's fixed places, and when the fused one would not run."""

from typing import Any

import pytest
import torch
from decoding_cases import decoded, network, random_state, stepped, tokens
from support import assert_same

from mmrec.decoding import Decoder, decoder, support
from mmrec.decoding.support import unsupported

OPTIONS = {"HEM": {}, "six": {"use_hem": False}, "DPG": {"use_dpg": True}, "window": {"window_every": 2, "window": 4}}
OPTIONS |= {f"window, {taps} taps": {"window_every": 2, "window": 4, "window_conv": taps} for taps in (1, 3)}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("batch", [1, 5])
def test_steps_are_the_networks_own(options: dict[str, Any], batch: int) -> None:
    model = network(model_dim=16, num_heads=2, num_layers=2, **options)
    state, given = random_state(model, batch), tokens(model, batch, 3)
    expected, expected_state = stepped(model, state, given)
    logits, after = decoded(Decoder(model, batch, fused=False), state, given)
    assert_same(torch.stack(logits), torch.stack(expected), limit=0.0)
    for found, wanted in zip(after, expected_state, strict=True):
        for ours, theirs in zip(found.kept(), wanted.kept(), strict=True):
            assert torch.equal(ours, theirs)


def test_a_float64_network_keeps_its_precision() -> None:
    model = network(model_dim=16, num_heads=2).double()
    used = Decoder(model)
    assert used.logits.dtype == used.state[0].M.dtype == torch.float64
    assert not used.fused


def test_everything_stays_in_its_place() -> None:
    model = network(model_dim=16, num_heads=2)
    used = Decoder(model, fused=False)
    places = [tensor.data_ptr() for own in used.state for tensor in own[:2]] + [used.logits.data_ptr(), used.tokens.data_ptr()]
    decoded(used, random_state(model, 1), tokens(model, 1, 2))
    assert places == [tensor.data_ptr() for own in used.state for tensor in own[:2]] + [used.logits.data_ptr(), used.tokens.data_ptr()]


def test_why_the_fused_step_would_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(model_dim=16, num_heads=2)
    monkeypatch.setattr(support, "runs_kernel", lambda *_: False)
    assert unsupported(model, 1) == "the network lies on cpu"
    monkeypatch.setattr(support, "runs_kernel", lambda *_: True)
    assert unsupported(model, 4) == ""
    assert unsupported(network(model_dim=16, num_heads=2).bfloat16(), 4) == ""
    assert "5 sequences" in unsupported(model, 5)
    windows = network(model_dim=16, num_heads=2, window_every=1).bfloat16()
    assert unsupported(windows, 4) == ""
    windows.blocks[0].temperature.log_temperature.data = torch.zeros(2, dtype=torch.bfloat16)
    assert "log_temperature is torch.bfloat16" in unsupported(windows, 1)
    windows = network(model_dim=16, num_heads=2, window_every=1, window_conv=3).bfloat16()
    assert unsupported(windows, 1) == ""
    windows.blocks[0].convolution.k_gain.data = torch.zeros(16, 3, dtype=torch.bfloat16)
    assert "k_gain is torch.bfloat16" in unsupported(windows, 1)
    assert "use_hem" in unsupported(network(model_dim=16, num_heads=2, use_hem=False), 1)
    assert "1024 channels" in unsupported(network(model_dim=1024, num_heads=1), 1)
    assert "torch.float64" in unsupported(network(model_dim=16).double(), 1)
    assert "torch.float16" in unsupported(network(model_dim=16).half(), 1)
    assert "rows of 3" in unsupported(network(model_dim=12, num_heads=2).bfloat16(), 1)  # D/4 = 3: half a word
    model.blocks[0].W_o.bfloat16()
    assert "W_o.weight is torch.bfloat16" in unsupported(model, 1)


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(model_dim=16, num_heads=2, num_layers=2)
    with pytest.raises(ValueError, match="batch_size is 0"):
        Decoder(model, 0)
    monkeypatch.setattr(decoder, "unsupported", lambda *_: "the reason")
    with pytest.raises(ValueError, match="cannot run: the reason"):
        Decoder(model, fused=True)
    used = Decoder(model, 2)
    assert (used.fused, used.reason) == (False, "the reason")
    with pytest.raises(ValueError, match="state has 1 layers, the network 2"):
        used.load(model.init_state(2)[:1])
    with pytest.raises(ValueError, match=r"state has h, M, a window's tensors and the tokens convolved of \[\(3, 16\)"):
        used.load(model.init_state(3))
    used.close()
    with pytest.raises(RuntimeError, match="closed"):
        used.advance()
