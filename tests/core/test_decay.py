"""Decays: where they start, how exactly they are computed, and that they stay fp32."""

import math

import pytest
import torch
from support import assert_same

from mmrec.config import MMRecConfig
from mmrec.core.decay import LOG_GAMMA_MAX, LOG_GAMMA_MIN, HeadDecay, spread_time_constants
from mmrec.core.mdi import MDI
from mmrec.ops import decay_log


def small(**fields) -> MMRecConfig:
    return MMRecConfig(vocab_size=11, model_dim=64, num_layers=1, num_heads=2, dpg_rank=8, **fields)


@pytest.mark.parametrize("use_dpg", [True, False], ids=["DPG", "MDI"])
def test_time_constants_start_log_uniform_in_every_head(use_dpg: bool) -> None:
    mdi = MDI(small(use_dpg=use_dpg))
    zero = torch.zeros(1, 1, 64)
    log_gamma = mdi(zero, zero)[0, 0]
    time_constants = (1 / -torch.expm1(log_gamma)).double()
    expected = spread_time_constants(64, (1.5, 16.0), groups=2)
    assert_same(time_constants, expected, limit=1e-3)
    for head in time_constants.log().split(32):
        assert head.min() < math.log(1.6)
        assert head.max() > math.log(15)
        assert head.diff().std() < 1e-2


@pytest.mark.parametrize("use_dpg", [True, False], ids=["DPG", "MDI"])
@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
def test_log_gamma_is_bounded_and_fp32(use_dpg: bool, size: float) -> None:
    mdi = MDI(small(use_dpg=use_dpg)).bfloat16()
    z, k = (size * torch.randn(2, 5, 64, dtype=torch.bfloat16) for _ in range(2))
    log_gamma = mdi(z, k)
    assert log_gamma.dtype == torch.float32
    assert log_gamma.max() <= -1e-6
    assert log_gamma.min() >= math.log(1e-6) - 1e-5


def test_log_decay_is_exact_where_a_sigmoid_rounds_to_one() -> None:
    logits = torch.linspace(-12, 13, 200)
    exact = torch.nn.functional.logsigmoid(logits.double())
    log_gamma = decay_log(logits.view(1, 1, -1), torch.zeros(200), low=LOG_GAMMA_MIN, high=LOG_GAMMA_MAX).flatten()
    assert_same(-torch.expm1(log_gamma).double(), -torch.expm1(exact), limit=1e-6)
    naive = 1 - torch.sigmoid(logits)
    assert ((naive.double() + torch.expm1(exact)) / torch.expm1(exact)).abs().max() > 1e-3  # what the log domain is for


def test_head_decay_starts_log_uniform_and_follows_the_formula() -> None:
    decay = HeadDecay(64, 4, 0.02)
    time_constants = -1 / decay(torch.zeros(1, 1, 64))[0, 0]
    assert_same(time_constants.double(), spread_time_constants(4, (8.0, 2048.0)), limit=1e-4)
    x = torch.randn(2, 3, 64)
    expected = -decay.A_log.exp() * torch.log1p(torch.exp(x @ decay.w_alpha.T + decay.dt_bias))
    assert_same(decay(x), expected)


def test_decay_parameters_stay_fp32_in_a_bf16_network() -> None:
    mdi, decay = MDI(small()).to(torch.bfloat16), HeadDecay(64, 2, 0.02).bfloat16()
    assert mdi.decay_mlp.out_bias.bias.dtype == torch.float32
    assert mdi.decay_mlp.W_out.weight.dtype == torch.bfloat16
    assert {p.dtype for p in decay.parameters()} == {torch.float32}
    assert decay(torch.randn(1, 2, 64, dtype=torch.bfloat16)).dtype == torch.float32
    assert HeadDecay(64, 2, 0.02).double().A_log.dtype == torch.float64


def test_head_decay_ignores_autocast() -> None:
    decay, x = HeadDecay(64, 2, 0.02), torch.randn(1, 5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = decay(x)
    assert torch.equal(under_autocast, decay(x))
