"""The fused step where layers have a window, through Triton's interpreter: against the network's own step, and against the operators."""

from typing import Any

import pytest
import torch
from decoding_cases import decoded, network, random_state, stepped, tokens
from support import assert_same, relative_error

from mmrec.blocks.composition import read_out, window_memory
from mmrec.blocks.mm_rec_block import MMRecBlock
from mmrec.core.memory import BlockState
from mmrec.decoding import Decoder
from mmrec.decoding.fused_step import FusedStep
from mmrec.decoding.tiles import overridden
from mmrec.model import MMRecModel
from mmrec.ops.window_attention import WindowState

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # the projections' parts, the heads' decay logits, h: (B, T, ...)

pytestmark = pytest.mark.interpreted

# A program takes 4 slots.
NETWORKS: dict[str, dict[str, Any]] = {
    "a token": {"window": 1},
    "less than a program's slots": {"window": 3},
    "a power of two": {"window": 8},
    "a part of the last program": {"window": 13},
    "two layers of four": {"window": 6, "num_layers": 4, "window_every": 2},
    "odd heads, odd rows": {"window": 5, "model_dim": 44, "ffn_dim": 27},
    "heads of one channel": {"window": 5, "model_dim": 8, "num_heads": 8},
    "heads of 64": {"window": 5, "model_dim": 64, "num_heads": 1},
    "no convolution": {"window": 13, "window_conv": 1},
    "three taps, odd heads": {"window": 5, "window_conv": 3, "model_dim": 44, "ffn_dim": 27},
    "more taps than slots": {"window": 2, "window_conv": 7},
    "three taps, two layers of four": {"window": 6, "window_conv": 3, "num_layers": 4, "window_every": 2},
    "DPG, no state gate": {"window": 5, "use_dpg": True, "dpg_rank": 20, "state_gate": False},
}


def windowed(**options: Any) -> MMRecModel:
    return network(**({"model_dim": 16, "num_heads": 2, "ffn_dim": 24, "window_every": 1} | options))


def assert_same_state(found: list[BlockState], wanted: list[BlockState], dtype: torch.dtype = torch.float32) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        for tensor, expected in zip(ours.kept(), theirs.kept(), strict=True):
            assert_same(tensor, expected, dtype)


@pytest.mark.parametrize("name", NETWORKS)
def test_steps_are_the_networks_own(name: str) -> None:
    model = windowed(**NETWORKS[name])
    state, given = random_state(model, 2), tokens(model, 2, 3)
    expected, expected_state = stepped(model, state, given)
    logits, after = decoded(Decoder(model, 2, fused=True), state, given)
    for index, (found, wanted) in enumerate(zip(logits, expected, strict=True)):
        assert_same(found, wanted, what=f"logits of step {index}")
    assert_same_state(after, expected_state)


@pytest.mark.parametrize("taps", [1, 3, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_from_the_first_token_until_the_rings_have_come_round(batch: int, taps: int) -> None:
    model = windowed(window=5, window_conv=taps)
    state, given = model.init_state(batch), tokens(model, batch, 8)
    expected, expected_state = stepped(model, state, given)
    with Decoder(model, batch, fused=True) as decoder:
        for count, (token, wanted) in enumerate(zip(given, expected, strict=True), 1):
            assert_same(decoder.step(token), wanted)
            assert decoder.state[0].window.seen.sum(1).tolist() == [min(count, 4)] * batch
        assert_same_state(decoder.state, expected_state)


def test_what_was_not_seen_does_not_count() -> None:
    model = windowed(window=6)
    state, given = random_state(model, 2), tokens(model, 2, 3)
    state[0].window.seen[0, :2] = False
    state[0].window.seen[1] = False
    expected, expected_state = stepped(model, state, given)
    logits, after = decoded(Decoder(model, 2, fused=True), state, given)
    assert_same(torch.stack(logits), torch.stack(expected))
    assert_same_state(after, expected_state)


def test_a_state_read_back_goes_on_elsewhere() -> None:
    model = windowed(window=5, num_layers=2, window_every=2)
    given = tokens(model, 2, 5)
    first = Decoder(model, 2, fused=True)
    decoded(first, random_state(model, 2), given[:3])  # the ring stands in the middle
    state = [BlockState(own.h.clone(), own.M.clone(), None, own.window, own.recent) for own in first.state]
    wanted = torch.stack([first.step(token).clone() for token in given[3:]])
    for decoder in (first, Decoder(model, 2, fused=True), Decoder(model, 2, fused=False)):
        assert_same(torch.stack(decoded(decoder, state, given[3:])[0]), wanted)


def test_matrices_stay_in_their_places() -> None:
    model = windowed(window=3, num_layers=2, window_every=2)
    decoder = Decoder(model, fused=True)
    places = [tensor.data_ptr() for own in decoder.state for tensor in own[:2]]
    decoded(decoder, random_state(model, 1), tokens(model, 1, 1))
    assert places == [tensor.data_ptr() for own in decoder.state for tensor in own[:2]]


def test_states_of_another_window_are_refused() -> None:
    decoder = Decoder(windowed(window=3), fused=True)
    with pytest.raises(ValueError, match=r"a window's tensors and the tokens convolved of .*\(1, 4, 2, 8\)"):
        decoder.load(windowed(window=5).init_state(1))


def test_states_of_another_convolution_are_refused() -> None:
    decoder = Decoder(windowed(window=3), fused=True)
    for taps in (1, 3):
        with pytest.raises(ValueError, match=r"a window's tensors and the tokens convolved of .*; give .*\(1, 3, 32\)\]"):
            decoder.load(windowed(window=3, window_conv=taps).init_state(1))


@pytest.mark.parametrize("taps", [1, 3, 4])
def test_bf16_is_as_near_to_the_truth_as_the_networks_own_step(taps: int) -> None:
    options = {"model_dim": 40, "window": 7, "window_conv": taps}
    model, exact = windowed(**options).bfloat16(), windowed(**options).double()
    exact.load_state_dict(model.state_dict())
    state, given = random_state(model, 2), tokens(model, 2, 3)
    truth, true_state = stepped(exact, state, given)
    own, _ = stepped(model, state, given)
    logits, after = decoded(Decoder(model, 2, fused=True), state, given)
    for found, ordinary, wanted in zip(logits, own, truth, strict=True):
        assert relative_error(found, wanted) < 1.5 * relative_error(ordinary, wanted) < 0.05
    assert_same_state(after, true_state, torch.bfloat16)


def test_nothing_is_read_before_it_is_written(poisoned_memory: None) -> None:
    model = windowed(window=6)
    logits, after = decoded(Decoder(model, fused=True), model.init_state(1), tokens(model, 1, 2))
    assert all(one.isfinite().all() for one in (*logits, *after[0].kept()))


class Layer:
    """The window's kernel alone, on random inputs, and what float64 makes of the same."""

    def __init__(self, window: int, batch: int, dtype: torch.dtype, taps: int = 4) -> None:
        self.model = windowed(window=window, window_conv=taps).to(dtype)
        state = self.model.init_state(batch)
        self.step = FusedStep(self.model, state, torch.zeros(batch, self.model.config.vocab_size, dtype=dtype))
        (self.ring,) = self.step.rings
        (self.launch,) = [launch for launch in self.step.launches if launch.name == "window"]
        self.h = state[0].h

    @torch.no_grad()
    def run(self, inputs: Inputs) -> torch.Tensor:
        """`y`, (B, T, D)."""
        parts, logits, h = inputs
        found = []
        for index in range(h.shape[1]):
            self.step.parts[:, : parts.shape[-1]] = parts[:, index]
            self.step.alpha_logits.copy_(logits[:, index])
            self.h.copy_(h[:, index])
            self.launch.run()
            found.append(self.step.y.clone())
        return torch.stack(found, dim=1)

    @torch.no_grad()
    def truth(self, inputs: Inputs) -> tuple[torch.Tensor, WindowState, torch.Tensor | None]:
        """The same by the operators, and the window and the last q and k after the last token."""
        parts, logits, h = inputs
        block = MMRecBlock(self.model.config).double()
        block.load_state_dict(self.model.blocks[0].state_dict())
        dim, decay = self.model.config.model_dim, block.head_decay
        q, k, v, _, _, e = parts.double().split([dim, dim, dim, dim, self.model.config.pe_width, dim], dim=-1)
        log_alpha = -decay.A_log.exp() * torch.nn.functional.softplus(logits.double() + decay.dt_bias)
        r, window, recent = window_memory(block, q, k, v, h.double(), log_alpha, None, None)
        return read_out(block, h.double(), r, e), window, recent

    def draw(self, batch: int, time: int) -> Inputs:
        config = self.model.config
        parts = torch.randn(batch, time, 5 * config.model_dim + config.pe_width, dtype=self.step.parts.dtype)
        return parts, torch.randn(batch, time, config.heads), torch.randn(batch, time, config.model_dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("window", "slots", "batch", "taps"), [(1, 4, 1, 4), (2, 1, 3, 3), (7, 2, 1, 4), (7, 8, 3, 1), (9, 4, 3, 3), (9, 2, 2, 1)]
)
def test_the_kernel_alone_through_several_rounds(window: int, slots: int, batch: int, taps: int, dtype: torch.dtype) -> None:
    with overridden(window={"BN": slots, "num_warps": 1}):
        layer = Layer(window, batch, dtype, taps)
    inputs = layer.draw(batch, 2 * window + 3)
    expected, state, recent = layer.truth(inputs)
    assert_same(layer.run(inputs), expected, dtype)
    for found, wanted in zip(layer.ring.state(), state, strict=True):
        assert_same(found, wanted, dtype)
    if taps == 1:
        assert layer.ring.recent_tokens() is recent is None
    else:
        assert torch.equal(layer.ring.recent_tokens().double(), recent)


def test_a_long_run_stays_exact() -> None:
    layer = Layer(7, 1, torch.float32)
    inputs = layer.draw(1, 200)
    expected, state, _ = layer.truth(inputs)
    found = layer.run(inputs)
    assert_same(found[:, -7:], expected[:, -7:])
    assert_same(found, expected)
    wanted = torch.cat([state.log_alpha[:, 1:], torch.zeros(1, 1, 2)], dim=1).flip(1).cumsum(1).flip(1)
    order = (int(layer.ring.position[0, 0]) + torch.arange(1, 7)) % 7
    assert_same(layer.ring.decay[:, :, order].transpose(1, 2), wanted, torch.float32)
    assert layer.ring.position.tolist() == [[200 % 7] * 2]
    assert layer.ring.recent_position.tolist() == [[200 % 4] * 2]
    assert not layer.step.arrived.any()


def test_decays_beyond_what_an_exponential_holds() -> None:
    layer = Layer(5, 1, torch.float32)
    parts, logits, h = layer.draw(1, 8)
    inputs = (parts, 500 * logits.abs(), h)
    assert_same(layer.run(inputs), layer.truth(inputs)[0])


def test_sums_are_merged_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmrec.decoding.tiles.SUMS", 16)  # two programs' at a time
    with overridden(window={"BN": 1, "num_warps": 1}):
        layer = Layer(7, 1, torch.float32)
    assert (layer.launch.named["SPLITS"], layer.launch.named["PARTS"]) == (7, 2)
    inputs = layer.draw(1, 9)
    assert_same(layer.run(inputs), layer.truth(inputs)[0])
