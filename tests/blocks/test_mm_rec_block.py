"""A block: which operators it calls, its state, what it refuses."""

import pytest
import torch
from support import RecordedOperators, assert_same

from mmrec.blocks.mm_rec_block import MMRecBlock


def block(**fields) -> MMRecBlock:
    return MMRecBlock(**{"model_dim": 32, "num_heads": 2, "pe_dim": 8, **fields})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"gated_scan_from_logits": 2, "memory_scan_kept": 2}),
        ({"state_gate": False}, {"linear_scan": 2, "exp_product_scan": 1, "memory_scan": 2}),
        ({"window_every": 1}, {"gated_scan_from_logits": 1, "gated_scan": 1, "window_attention": 2, "short_convolution": 4}),
        ({"window_every": 1, "window_conv": 1}, {"gated_scan_from_logits": 1, "gated_scan": 1, "window_attention": 2}),
    ],
    ids=["state gate", "linear", "window", "window without a convolution"],
)
def test_the_block_calls_its_operators(fields: dict, expected: dict[str, int]) -> None:
    one = block(**fields)
    with RecordedOperators() as recorded:
        _, state = one(torch.randn(2, 5, 32), return_state=True)
        one(torch.randn(2, 5, 32), state=state)
    scans = [name for name in recorded.names if "_scan" in name or name in ("window_attention", "short_convolution")]
    assert {name: scans.count(name) for name in scans} == expected


def test_the_linear_form_is_the_core_formula_with_no_state_in_the_gate() -> None:
    torch.manual_seed(2)
    gated = block(decay_accum_dtype="float64").double()
    torch.manual_seed(2)
    linear = block(state_gate=False, decay_accum_dtype="float64").double()
    assert not linear.state_gate.w_g.requires_grad
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    reset = torch.zeros(2, 20, dtype=torch.bool)
    reset[0, [3, 9]] = True
    state = None
    for piece, mask in ((x, None), (x, reset), (x, None)):
        expected, expected_state = gated(piece, state=state, reset=mask, return_state=True)
        actual, state = linear(piece, state=state, reset=mask, return_state=True)
        assert_same(actual, expected)
        assert_same(state.h, expected_state.h)


@pytest.mark.parametrize("use_dpg", [True, False], ids=["DPG", "MDI"])
@pytest.mark.parametrize("state_gate", [True, False], ids=["gated", "linear"])
@pytest.mark.parametrize("window", [{}, *({"window_every": 1, "window": 5, "window_conv": taps} for taps in (1, 4, 16))], ids=str)
def test_split_and_carried_equals_whole(state_gate: bool, use_dpg: bool, window: dict) -> None:
    one = block(state_gate=state_gate, use_dpg=use_dpg, **window).double()
    with torch.no_grad():
        one.state_gate.w_g.normal_() if state_gate else None
        for gain in () if one.convolution is None else one.convolution.gains():
            gain.normal_()
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    whole, last = one(x, return_state=True)
    head, state = one(x[:, :7], return_state=True)
    tail, state = one(x[:, 7:], state=state, return_state=True)
    assert_same(torch.cat([head, tail], 1), whole)
    for actual, expected in zip(state.kept(), last.kept(), strict=True):
        assert_same(actual.double(), expected.double())


def test_at_the_start_a_convolution_changes_nothing() -> None:
    outputs, x = [], torch.randn(2, 20, 32)
    for taps in (1, 4):
        torch.manual_seed(2)
        outputs.append(block(window_every=1, window=5, window_conv=taps)(x))
    assert torch.equal(*outputs)


def test_use_hem_cannot_be_assigned() -> None:
    one = block()
    assert one.use_hem is True
    with pytest.raises(AttributeError, match=r"use_hem cannot be assigned.*set_hem\(False\)"):
        one.use_hem = False
    assert one.use_hem is True


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pe_dim": 5}, "pe_dim = 5 does not divide model_dim = 32"),
        ({"num_heads": 3}, "num_heads = 3 does not divide model_dim = 32"),
        ({"planning_loss": "l1"}, "planning_loss is 'l1'; choose one of mse, normalized"),
        ({"model_dim": 0}, "model_dim is 0; give a whole number"),
        ({"dpg_rank": 1.5}, "dpg_rank is 1.5"),
        ({"lambda_P": float("nan")}, "lambda_P is nan"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0"),
        ({"window_conv": 0}, "window_conv is 0; give a whole number of at least 1"),
        ({"window_conv": 17}, "window_conv = 17 is more than 16 tokens"),
    ],
)
def test_bad_sizes_are_refused_in_one_line(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        block(**fields)
    assert "\n" not in str(error.value)


def test_an_unknown_option_is_refused_with_the_nearest() -> None:
    with pytest.raises(TypeError, match="MMRecBlock has no option 'num_head'; did you mean 'num_heads'"):
        block(num_head=2)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "mixed"])
@pytest.mark.parametrize("memory", [{}, {"window_every": 1, "window": 4}], ids=["matrix", "window"])
@pytest.mark.parametrize("orthogonalize", [True, False])
def test_a_compiled_block_equals_the_eager_one(orthogonalize: bool, memory: dict, autocast: bool) -> None:
    """Called as the network does in training, with the loss and the state; then once more, from that state."""
    one = block(orthogonalize=orthogonalize, **memory)
    x = torch.randn(2, 9, 32)
    torch._dynamo.reset()
    results = []
    for function in (one, torch.compile(one, backend="aot_eager", fullgraph=True)):
        one.zero_grad()
        outputs, losses, state = [], [], None
        for piece in x.split([5, 4], dim=1):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y, planning, state = function(piece, state=state, return_auxiliary_loss=True, return_state=True)
            outputs.append(y)
            losses.append(y.float().square().mean() + planning.mean())
        sum(losses).backward()
        after = [state.planning, *state.kept()]
        gradients = [p.grad for p in one.parameters() if p.grad is not None]
        results.append([tensor.detach().float() for tensor in (*outputs, *losses, *after, *gradients)])
    assert len(results[0]) == len(results[1]) > 20
    for actual, expected in zip(results[1], results[0], strict=True):
        assert_same(actual, expected, torch.bfloat16 if autocast else torch.float32)
