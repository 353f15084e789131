"""The fused step's kernels, through Triton's interpreter, against the network's own step."""

from typing import Any

import pytest
import torch
from decoding_cases import SMALL, decoded, network, random_state, stepped, tokens
from support import assert_same, relative_error

from mmrec.decoding import Decoder
from mmrec.decoding.tiles import overridden

pytestmark = pytest.mark.interpreted

NETWORKS: dict[str, dict[str, Any]] = {
    "heads of 16": {"model_dim": 48, "num_heads": 3, "num_layers": 2},
    "heads of 64": {"model_dim": 64, "num_heads": 1},
    "heads of 128": {"model_dim": 128, "num_heads": 1},
    "odd heads, odd rows": {"model_dim": 44, "num_heads": 2, "ffn_dim": 27},
    "heads of one channel": {"model_dim": 8, "num_heads": 8},
    "narrow P": {"model_dim": 48, "num_heads": 3, "pe_dim": 4},
    "DPG": {"model_dim": 48, "num_heads": 3, "use_dpg": True, "dpg_rank": 20},
    "no state gate": {"model_dim": 48, "num_heads": 3, "state_gate": False},
    "untied head": {"model_dim": 48, "num_heads": 3, "tie_embeddings": False},
    "with planning projections": {"model_dim": 48, "num_heads": 3, "use_uboo": True},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_steps_are_the_networks_own(name: str) -> None:
    model = network(**NETWORKS[name])
    state, given = random_state(model, 2), tokens(model, 2, 3)
    expected, expected_state = stepped(model, state, given)
    logits, after = decoded(Decoder(model, 2, fused=True), state, given)
    for index, (found, wanted) in enumerate(zip(logits, expected, strict=True)):
        assert_same(found, wanted, what=f"logits of step {index}")
    for found, wanted in zip(after, expected_state, strict=True):
        assert_same(found.h, wanted.h, what="h")
        assert_same(found.M, wanted.M, what="M")


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_any_batch(batch: int) -> None:
    model = network(model_dim=16, num_heads=2, ffn_dim=24)
    state, given = random_state(model, batch), tokens(model, batch, 2)
    expected, _ = stepped(model, state, given)
    logits, _ = decoded(Decoder(model, batch, fused=True), state, given)
    assert_same(logits[-1], expected[-1])


@pytest.mark.parametrize("columns", [4, 16])
def test_a_heads_memory_in_slices_and_whole(columns: int) -> None:
    model = network(model_dim=24, num_heads=2, ffn_dim=24)  # 12 of 16 columns exist
    state, given = random_state(model, 1), tokens(model, 1, 3)
    expected, expected_state = stepped(model, state, given)
    with overridden(memory={"BV": columns, "num_warps": 1}):
        logits, after = decoded(Decoder(model, fused=True), state, given)
    assert_same(logits[-1], expected[-1])
    assert_same(after[0].M, expected_state[0].M)


@pytest.mark.parametrize("tile", [{"R": 1, "BW": 64, "num_warps": 1}, {"R": 8, "BW": 4, "num_warps": 1}])
def test_any_tile(tile: dict[str, int]) -> None:
    model = network(model_dim=16, num_heads=2, ffn_dim=24)
    state, given = random_state(model, 1), tokens(model, 1, 2)
    expected, _ = stepped(model, state, given)
    with overridden(**{name: tile for name in SMALL if name != "memory"}):
        logits, _ = decoded(Decoder(model, fused=True), state, given)
    assert_same(logits[-1], expected[-1])


def test_bf16_is_as_near_to_the_truth_as_the_networks_own_step() -> None:
    model = network(model_dim=48, num_heads=3, pe_dim=4).bfloat16()
    exact = network(model_dim=48, num_heads=3, pe_dim=4).double()
    exact.load_state_dict(model.state_dict())
    state, given = random_state(model, 2), tokens(model, 2, 3)
    truth, true_state = stepped(exact, state, given)
    own, _ = stepped(model, state, given)
    logits, after = decoded(Decoder(model, 2, fused=True), state, given)
    for found, ordinary, wanted in zip(logits, own, truth, strict=True):
        assert relative_error(found, wanted) < 1.5 * relative_error(ordinary, wanted) < 0.05
    for found, wanted in zip(after, true_state, strict=True):
        assert_same(found.h, wanted.h, torch.bfloat16)
        assert_same(found.M, wanted.M, torch.bfloat16)


def test_nothing_is_read_before_it_is_written(poisoned_memory: None) -> None:
    model = network(model_dim=24, num_heads=2, ffn_dim=24)
    logits, after = decoded(Decoder(model, fused=True), random_state(model, 1), tokens(model, 1, 2))
    assert all(one.isfinite().all() for one in (*logits, after[0].h, after[0].M))


def test_weights_that_change_in_place_count() -> None:
    model = network(model_dim=16, num_heads=2, ffn_dim=24)
    decoder = Decoder(model, fused=True)
    state, given = random_state(model, 1), tokens(model, 1, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert_same(decoded(decoder, state, given)[0][0], stepped(model, state, given)[0][0])


def test_greedy_decoding_goes_on_by_itself() -> None:
    model = network(model_dim=16, num_heads=2, ffn_dim=24)
    state = random_state(model, 2)
    chosen, wanted = [], []
    with Decoder(model, 2, greedy=True) as decoder:
        assert decoder.fused
        decoder.load(state)
        decoder.step(torch.tensor([7, 7]))
        for _ in range(3):
            chosen.append(decoder.tokens.tolist())
            decoder.advance()
    token = torch.tensor([7, 7])
    for _ in range(3):
        (logits,), state = stepped(model, state, [token])
        token = logits.argmax(-1)
        wanted.append(token.tolist())
    assert chosen == wanted
