"""Gated DeltaNet and GLA, where flash-linear-attention and a GPU are there: as large as counted, causal, every parameter trained, and their
gradients right: Triton has miscompiled such kernels on Hopper."""

import importlib.util
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from test_baselines import gated_deltanet_weights, of_study
from torch import Tensor

from mmrec.baselines import BaselineConfig, BaselineModel
from mmrec.measuring.errors import LIMITS, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
T, CHANGED = 100, 70  # its kernels take 64 tokens at a time: the changed one lies in the second chunk


@pytest.fixture(autouse=True)
def _fla() -> None:
    pytest.importorskip("fla")


@pytest.fixture
def network() -> BaselineModel:
    sizes = {"vocab_size": 50, "model_dim": 256, "num_layers": 2, "num_heads": 2, "ffn_dim": 256}
    return BaselineModel(BaselineConfig(kind="gated-deltanet", **sizes)).to("cuda")


def tokens(length: int) -> torch.Tensor:
    return torch.randint(50, (2, length), generator=torch.Generator().manual_seed(0)).to("cuda")


def skip_where_the_backward_is_wrong() -> None:
    """The library refuses it there itself, unless tilelang computes it."""
    import triton

    hopper = torch.cuda.get_device_capability()[0] == 9
    if hopper and Version("3.4") <= Version(triton.__version__) < Version("3.7.1") and importlib.util.find_spec("tilelang") is None:
        pytest.skip(
            f"Triton {triton.__version__} miscompiles the backward of gated linear attention on Hopper and flash-linear-attention "
            "raises (its issue 640); needs Triton 3.7.1 or tilelang"
        )


@pytest.mark.parametrize("size", ["35m", "120m"])
def test_it_is_as_large_as_counted(size: str) -> None:
    _, config = of_study(size, "gated-deltanet")
    with torch.device("meta"):
        assert BaselineModel(config).num_parameters() == gated_deltanet_weights(config)


@torch.no_grad()
def test_no_token_reaches_an_earlier_output(network: BaselineModel) -> None:
    ids = tokens(T)
    changed = ids.clone()
    changed[:, CHANGED] = (changed[:, CHANGED] + 1) % 50
    with torch.autocast("cuda", torch.bfloat16):  # its kernels take no fp32
        difference = (network(ids) - network(changed)).abs().amax((0, 2))
    assert difference[:CHANGED].max() == 0
    assert difference[CHANGED] > 0
    assert difference[CHANGED + 8 :].max() > 0  # by its state: the two layers' convolutions reach six tokens


def test_the_loss_reaches_every_parameter(network: BaselineModel) -> None:
    skip_where_the_backward_is_wrong()
    ids = tokens(T + 1)
    with torch.autocast("cuda", torch.bfloat16):
        loss = network.loss({"input_ids": ids[:, :-1], "labels": ids[:, 1:].clone()}).loss
    loss.backward()
    assert loss.isfinite()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """`M_t = α_t M_{t−1} + β_t k_t (v_t − α_t M_{t−1}ᵀ k_t)ᵀ`, `r_t = M_tᵀ q_t / √K`, a token at a time."""
    memory = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1])
    read = []
    for t in range(q.shape[1]):
        memory = g[:, t].exp()[..., None, None] * memory
        error = beta[:, t].unsqueeze(-1) * (v[:, t] - (memory * k[:, t].unsqueeze(-1)).sum(-2))
        memory = memory + k[:, t].unsqueeze(-1) * error.unsqueeze(-2)
        read.append((memory * q[:, t].unsqueeze(-1)).sum(-2) * q.shape[-1] ** -0.5)
    return torch.stack(read, 1)


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """`M_t = diag(α_t) M_{t−1} + k_t v_tᵀ`, `r_t = M_tᵀ q_t / √K`, a token at a time."""
    memory = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1])
    read = []
    for t in range(q.shape[1]):
        memory = g[:, t].exp().unsqueeze(-1) * memory + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        read.append((memory * q[:, t].unsqueeze(-1)).sum(-2) * q.shape[-1] ** -0.5)
    return torch.stack(read, 1)


def drawn(heads: int, keys: int, values: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k of length 1, v, in bf16; T is no multiple of a chunk."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(width: int) -> Tensor:
        return torch.randn(2, 2 * T + 1, heads, width, device="cuda", generator=generator)

    return F.normalize(normal(keys), dim=-1).bfloat16(), F.normalize(normal(keys), dim=-1).bfloat16(), normal(values).bfloat16()


def check_gradients(kernel: Callable[..., tuple[Tensor, Tensor]], naive: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    given = [tensor.detach().requires_grad_() for tensor in inputs]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    output, expected = kernel(*given)[0], naive(*wide)
    above = torch.randn(output.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).to(output.dtype)
    got = (output, *torch.autograd.grad(output, given, above))
    wanted = (expected, *torch.autograd.grad(expected, wide, above.double()))
    names = ("r", "dq", "dk", "dv", "dg", "dbeta")[: 1 + len(inputs)]
    for name, ours, theirs in zip(names, got, wanted, strict=True):
        assert relative_error(ours, theirs) < LIMITS[torch.bfloat16], name


def test_the_delta_rule_s_gradients_against_float64() -> None:
    """Heads of the width that the study's networks have."""
    skip_where_the_backward_is_wrong()
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k, v = drawn(2, 96, 192)
    drawn_here = torch.randn(2, *q.shape[:3], device="cuda", generator=torch.Generator("cuda").manual_seed(2))
    g, beta = F.logsigmoid(drawn_here[0] + 3), drawn_here[1].sigmoid().bfloat16()
    check_gradients(chunk_gated_delta_rule, delta_rule, (q, k, v, g, beta))


def test_gated_linear_attention_s_gradients_against_float64() -> None:
    from fla.ops.gla import chunk_gla

    q, k, v = drawn(2, 96, 192)
    g = F.logsigmoid(torch.randn(q.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(2))) / 16
    check_gradients(chunk_gla, gated_linear_attention, (q, k, v, g))
