"""Gated DeltaNet, where flash-linear-attention and a GPU are there: as large as counted, causal, every parameter trained."""

import importlib.util

import pytest
import torch
from packaging.version import Version
from test_baselines import gated_deltanet_weights, of_study

from mmrec.baselines import BaselineConfig, BaselineModel

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
