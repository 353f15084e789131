"""What is particular to one operator: registration, strong decays, accumulation, grouped gates."""

import pytest
import torch
from cases import CASES, random_reset
from support import assert_same

from mmrec.ops import exp_product_scan, gated_scan, memory_scan
from mmrec.ops.gated_scan.pytorch import gated_scan_backward_pytorch, gated_scan_pytorch
from mmrec.ops.linear_scan.pytorch import linear_scan_backward_pytorch, linear_scan_pytorch
from mmrec.ops.memory_scan import memory_scan_naive

LINEAR, GATED, MEMORY = CASES[1], CASES[2], CASES[3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize(("case", "op"), [(LINEAR, linear_scan_pytorch), (GATED, gated_scan_pytorch)], ids=["linear", "gated"])
def test_opcheck(case, op, with_state: bool, dtype: torch.dtype) -> None:
    inputs = {name: tensor.requires_grad_() for name, tensor in case.draw(5, dtype).items()}
    if not with_state:
        inputs[case.state] = None
    torch.library.opcheck(op, (*inputs.values(), random_reset(5)))


@pytest.mark.parametrize(
    ("case", "op"), [(LINEAR, linear_scan_backward_pytorch), (GATED, gated_scan_backward_pytorch)], ids=["linear", "gated"]
)
def test_opcheck_of_the_backward(case, op) -> None:
    inputs = case.draw(5, torch.float32)
    output, last = case.op(**inputs)
    torch.library.opcheck(op, (torch.randn_like(output), torch.randn_like(last), *inputs.values(), None))


def test_decays_are_summed_in_the_dtype_asked_for() -> None:
    log_gamma = torch.full((1, 20000, 1), -1e-4)
    exact = torch.exp(torch.tensor(-1e-4, dtype=torch.float32).double() * 20000)
    in_double = exp_product_scan(log_gamma, accum_dtype=torch.float64)[0][0, -1, 0]
    in_single = exp_product_scan(log_gamma)[0][0, -1, 0]
    assert abs(in_double.double() / exact - 1) < 1e-7
    assert abs(in_single.double() / exact - 1) < 1e-4
    with pytest.raises(ValueError, match="accum_dtype"):
        exp_product_scan(log_gamma, accum_dtype=torch.bfloat16)


def test_strong_decay_overflows_nowhere() -> None:
    """At −5 a token a chunk spans e^320: a quotient of cumulative products would be inf · 0."""
    inputs = {name: tensor.requires_grad_() for name, tensor in MEMORY.draw(200, torch.float32).items()}
    with torch.no_grad():
        inputs["log_alpha"].fill_(-5.0)
    r, last = memory_scan(**inputs)
    (r.sum() + last.sum()).backward()
    expected, _ = memory_scan_naive(**{name: tensor.detach().double() for name, tensor in inputs.items()})
    assert_same(r, expected, torch.float32)
    for name, tensor in inputs.items():
        assert tensor.grad.isfinite().all(), name


def test_memory_scan_with_values_wider_than_keys_and_a_scale() -> None:
    q, k, v = torch.randn(2, 70, 3, 4), torch.randn(2, 70, 3, 4), torch.randn(2, 70, 3, 6)
    log_alpha = -torch.rand(2, 70, 3)
    for actual, expected in zip(memory_scan(q, k, v, log_alpha, scale=0.3), memory_scan_naive(q, k, v, log_alpha, scale=0.3), strict=True):
        assert_same(actual, expected)


def test_the_short_term_memory_stays_within_its_inputs() -> None:
    """`u = (1 − γ) z` bounds |h| by max(|h0|, max|z|) for any length."""
    inputs = GATED.draw(500, gates="near 1")
    inputs["w_g"] *= 50
    h, _ = gated_scan(**inputs)
    assert h.abs().max() <= max(inputs["h0"].abs().max(), inputs["z"].abs().max())


def test_a_gate_path_that_does_not_divide_is_refused() -> None:
    inputs = GATED.draw(3)
    inputs["p"] = torch.randn(2, 3, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="P = 5 does not divide D = 12"):
        gated_scan(**inputs)
