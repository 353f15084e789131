"""FP8: which products, what is refused, and that it trains."""

from types import ModuleType
from typing import Any

import pytest
import torch
from support import relative_error
from torch import nn
from torch.utils.data import DataLoader

from lightning_modules.float8 import check_float8, check_float8_batch, convert_to_float8, float8_linears
from mmrec.model import MMRecModel

SIZES: dict[str, Any] = {"vocab_size": 64, "model_dim": 64, "num_layers": 2, "num_heads": 2, "ffn_dim": 128}
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("use_hem", [True, False])
def test_the_large_products_and_no_others(use_hem: bool) -> None:
    network = MMRecModel(**SIZES, use_hem=use_hem)
    names = {name.removeprefix("blocks.0.") for name in float8_linears(network) if name.startswith("blocks.0.")}
    projections = ("fused",) if use_hem else ("q", "k", "v", "z", "p", "e")
    assert names == {f"projections.W_{part}" for part in projections} | {"W_o", "ffn.W_gate_up", "ffn.W_down"}
    assert len(float8_linears(network)) == 2 * len(names)


def test_what_cannot_run_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    network = MMRecModel(**SIZES)
    with pytest.raises(ValueError, match=r"model.fp8 needs bf16 .*trainer.precision=32-true; set it to bf16-mixed or bf16-true"):
        check_float8(network, CUDA, "32-true")
    with pytest.raises(ValueError, match=r"compute capability 8.9 or above, the CPU has none; set model.fp8=false"):
        check_float8(network, torch.device("cpu"), "bf16-mixed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"compute capability 8.9 or above, this one's is 8.0; set"):
        check_float8(network, CUDA, "bf16-mixed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_float8(network, CUDA, "bf16-true")
    with pytest.raises(ValueError, match=r"multiples of 16, blocks.0.ffn.W_gate_up is 64 → 200; change model.network"):
        check_float8(MMRecModel(**(SIZES | {"ffn_dim": 100})), CUDA, "bf16-true")


def test_tokens_of_a_batch() -> None:
    check_float8_batch(torch.zeros(2, 24))
    with pytest.raises(ValueError, match=r"tokens of a batch in multiples of 16, it is \(3, 9\)"):
        check_float8_batch(torch.zeros(3, 9))


def test_a_cpu_refuses_before_training(stubs: ModuleType, tmp_path: Any) -> None:
    module = stubs.make_module(fp8=True)
    with pytest.raises(ValueError, match="the CPU has none"):
        stubs.make_trainer(tmp_path, logger=False, precision="bf16-true").fit(module, datamodule=stubs.StubData())


def test_the_parameters_stay_where_they_were() -> None:
    """With FP8 emulated: the same names, the same tensors, nearly the same function, gradients for all."""
    config = pytest.importorskip("torchao.float8").Float8LinearConfig(emulate=True)
    network = MMRecModel(**SIZES).bfloat16()
    before = network.state_dict()
    batch = {name: torch.randint(64, (2, 16)) for name in ("input_ids", "labels")}
    expected = network.loss(batch).loss.detach()
    convert_to_float8(network, config)
    assert all(type(linear).__name__ == "Float8Linear" for linear in float8_linears(network).values())
    assert sum(type(module) is nn.Linear for module in network.modules()) > 0
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(after[name].data_ptr() == tensor.data_ptr() for name, tensor in before.items())
    loss = network.loss(batch).loss
    assert relative_error(loss, expected) < 0.02
    assert loss != expected
    loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters() if parameter.requires_grad)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_it_trains_on_a_gpu(precision: str, stubs: ModuleType, tmp_path: Any) -> None:
    losses = {}
    for fp8 in (False, True):
        module = stubs.make_module({"model_dim": 128, "num_heads": 2, "ffn_dim": 256}, fp8=fp8, compile_blocks=True)
        trainer = stubs.make_trainer(tmp_path, accelerator="gpu", logger=False, precision=precision, max_steps=6, limit_val_batches=0)
        trainer.fit(module, DataLoader([stubs.make_batch([0, 1, 2, 3])] * 6, batch_size=None))
        losses[fp8] = float(module.last_step_loss)
    kinds = {type(linear).__name__ for linear in float8_linears(module.network).values()}
    assert kinds == {"Float8Linear"}
    assert losses[True] == pytest.approx(losses[False], rel=0.05)
    assert losses[True] < torch.tensor(32.0).log()  # random tokens, one batch again and again: it learns them by heart
