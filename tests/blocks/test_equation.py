"""The block against its equation, written out token by token as in docs/math.md."""

import pytest
import torch
import torch.nn.functional as F
from support import assert_same
from torch import Tensor

from mmrec.blocks.mm_rec_block import MMRecBlock
from mmrec.core.memory import BlockState
from mmrec.ops import memory_address, memory_scan

D, H, P, B, T = 24, 3, 8, 2, 11
K = D // H


def block(**fields) -> MMRecBlock:
    """In float64, every parameter moved off its start, so that no zero hides a wrong path."""
    one = MMRecBlock(**{"model_dim": D, "num_heads": H, "pe_dim": P, "dpg_rank": 6, "norm_eps": 1e-6, **fields}).double()
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            if parameter.requires_grad and "out_bias" not in name and "up_bias" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return one


def rms_norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def l2(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def literal(one: MMRecBlock, x: Tensor, reset: Tensor, h: Tensor, M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The equation, one token after the other."""
    w = dict(one.named_parameters())

    def linear(name: str, value: Tensor) -> Tensor:
        return F.linear(value, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def gate_mlp(name: str, value: Tensor) -> Tensor:
        return linear(f"{name}.W_out", F.gelu(linear(f"{name}.W_in", value))) + w[f"{name}.out_bias.bias"]

    outputs = []
    for t in range(x.shape[1]):
        keep = (~reset[:, t]).to(x.dtype)
        h, M = h * keep[:, None], M * keep[:, None, None, None]
        x_t = rms_norm(x[:, t]) * w["norm.weight"]
        if one.use_hem:
            q, k, v, z, p, e = linear("projections.W_fused", x_t).split([D, D, D, D, P, D], dim=-1)
        else:
            q, k, v, z, p = (linear(f"projections.W_{name}", x_t) for name in "qkvzp")
            e = linear("projections.W_e", p)
        if one.config.use_dpg:
            gamma = torch.sigmoid(linear("mdi.W_up", F.relu(linear("mdi.W_down", z))) + w["mdi.up_bias.bias"])
        else:
            gamma = torch.sigmoid(gate_mlp("mdi.decay_mlp", z)) * torch.sigmoid(gate_mlp("mdi.context_mlp", k))
        p_bar = torch.stack([p[:, channel * P // D] for channel in range(D)], dim=-1)
        h = (1 - gamma) * z * torch.sigmoid(w["state_gate.w_g"] * h + p_bar) + gamma * h
        alpha = torch.exp(-w["head_decay.A_log"].exp() * F.softplus(F.linear(x_t, w["head_decay.w_alpha"], w["head_decay.dt_bias"])))
        query, key = l2((q + h).view(B, H, K)), l2((k + h).view(B, H, K))
        M = alpha[:, :, None, None] * M + torch.einsum("bhk,bhv->bhkv", key, v.view(B, H, K))
        r = torch.einsum("bhkv,bhk->bhv", M, query)
        read = w["g_r"] * rms_norm(r) + w["g_h"] * rms_norm(h.view(B, H, K))
        y = x[:, t] + linear("W_o", torch.sigmoid(e) * read.reshape(B, D))
        gate, up = linear("ffn.W_gate_up", rms_norm(y) * w["ffn_norm.weight"]).chunk(2, dim=-1)
        outputs.append(y + linear("ffn.W_down", F.silu(gate) * up))
    return torch.stack(outputs, dim=1), h, M


@pytest.mark.parametrize("state_gate", [True, False], ids=["gated", "linear"])
@pytest.mark.parametrize("use_dpg", [True, False], ids=["DPG", "MDI"])
@pytest.mark.parametrize("use_hem", [True, False], ids=["HEM", "six"])
def test_the_block_is_its_equation(use_hem: bool, use_dpg: bool, state_gate: bool) -> None:
    one = block(use_hem=use_hem, use_dpg=use_dpg, state_gate=state_gate, use_uboo=False, decay_accum_dtype="float64")
    x, h0, M0 = torch.randn(B, T, D), torch.randn(B, D), torch.randn(B, H, K, K)
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[0, [0, 4]] = reset[1, 7] = True
    weights = [torch.randn(shape, dtype=torch.float64) for shape in ((B, T, D), (B, D), (B, H, K, K))]

    def run(function) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [leaf.double().requires_grad_() for leaf in (x, h0, M0)]
        outputs = function(*leaves)
        trained = [parameter for parameter in one.parameters() if parameter.requires_grad]
        total = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
        return list(outputs), list(torch.autograd.grad(total, [*leaves, *trained]))

    def through_the_block(x: Tensor, h0: Tensor, M0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, state = one(x, state=BlockState(h0, M0), reset=reset, return_state=True)
        return y, state.h, state.M

    outputs, grads = run(through_the_block)
    expected_outputs, expected_grads = run(lambda x, h0, M0: literal(one, x, reset, h0, M0))
    for actual, expected in zip([*outputs, *grads], [*expected_outputs, *expected_grads], strict=True):
        assert_same(actual, expected, limit=1e-10)  # 1 − γ near γ = 1 is not computed with expm1 in the equation


def test_where_a_block_starts() -> None:
    one = MMRecBlock(model_dim=D, num_heads=H, pe_dim=P)
    assert torch.equal(one.g_r, torch.full((H, K), 0.1))
    assert torch.equal(one.g_h, torch.ones(H, K))
    assert torch.equal(one.state_gate.w_g, torch.zeros(D))


def test_the_recorded_gate_jacobian_is_the_bound_of_the_state_s_own_gradient() -> None:
    one, x, record = block(use_uboo=False), torch.randn(B, T, D, dtype=torch.float64), {}
    one(x, record=record)
    z = one.projections(one.norm(x)).z
    assert_same(record["gate_jacobian"], (z * one.state_gate.w_g / 4).abs(), torch.float32)


def test_norms_are_computed_in_fp32_on_bf16_inputs() -> None:
    """A memory of 1e5 and a decayed one differ in bf16's last digit; what is normalised is not rounded first."""
    one = MMRecBlock(model_dim=D, num_heads=H, pe_dim=P).bfloat16()
    seen = {}
    original = F.rms_norm

    def recording(x: Tensor, *args, **kwargs) -> Tensor:
        seen.setdefault(x.shape[-1], []).append(x.dtype)
        return original(x, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "rms_norm", recording)
        one(torch.randn(B, T, D, dtype=torch.bfloat16))
    assert seen[K] == [torch.float32, torch.float32]


def test_the_short_term_state_addresses_the_memory_in_fp32() -> None:
    q, k, v, h = (torch.randn(B, T, H, D // H) for _ in range(4))
    log_alpha = torch.full((B, T, H), -0.1)
    precise = memory_scan(*memory_address(q, k, h), v, log_alpha)[0]
    q, k, v, h = (x.bfloat16() for x in (q, k, v, h))
    rounded = memory_scan(*memory_address(q, k, h), v, log_alpha)[0]
    assert_same(rounded, precise, torch.bfloat16)
