"""The optimisers: which there are, what they refuse, and that none of their state is lost on the way through a checkpoint."""

import copy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from callbacks import RandomStates, RunCheckpoint
from callbacks.memory_readings import category_bytes
from lightning_modules import MMRecLightningModule
from lightning_modules.optimizers import (
    check_precision,
    check_saved_optimizer,
    import_torchao,
    make_optimizer,
    plain_state,
    set_learning_rate,
    whole_state,
)

LEAN = ("adamw_8bit", "adamw_bf16")
# Wide enough that the moments of its matrices are held in 8 bits: torchao leaves smaller ones as they are.
NETWORK = {"model_dim": 64, "num_heads": 2, "ffn_dim": 128}


def test_an_unknown_one_is_refused(stubs: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"model.optimizer is lion; give one of adamw, adamw_8bit, adamw_bf16"):
        stubs.make_module(optimizer="lion")


@pytest.mark.parametrize("option", [{"optimizer": "adamw_8bit"}, {"fp8": True}])
def test_without_torchao_one_line_says_how_to_get_it(
    option: dict[str, Any], tmp_path: Path, stubs: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before training; what the run left can be evaluated without it."""
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    monkeypatch.setattr("lightning_modules.mm_rec_module.check_float8", lambda *arguments: None)
    module = stubs.make_module(**option)
    stubs.make_trainer(tmp_path, logger=False).validate(module, datamodule=stubs.StubData())
    with pytest.raises(ModuleNotFoundError, match=r"^model\.\w+.* needs torchao, which is not installed; install it: pip") as error:
        stubs.make_trainer(tmp_path, logger=False).fit(module, datamodule=stubs.StubData())
    assert error.value.name is None  # the command line's sign of a fault that is the user's
    assert "\n" not in str(error.value)


def test_a_torchao_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ModuleNotFoundError, match=r"^a test needs torchao, which cannot be imported \(import of .*; install "):
        import_torchao("a test")


def test_nobody_imports_torchao_who_has_not_asked(stubs: ModuleType) -> None:
    before = "torchao" in sys.modules
    stubs.make_module()
    assert ("torchao" in sys.modules) == before


def test_moments_in_bf16_need_bf16_parameters() -> None:
    check_precision("adamw_bf16", "bf16-true")
    check_precision("adamw_8bit", "bf16-mixed")
    with pytest.raises(ValueError, match=r"adamw_bf16 .* trainer.precision=bf16-mixed makes fp32; set trainer.precision=bf16-true"):
        check_precision("adamw_bf16", "bf16-mixed")


@pytest.mark.parametrize(
    ("saved", "own"), [("adamw", "adamw_8bit"), ("adamw_8bit", "adamw"), ("adamw", "adamw_bf16"), ("adamw_bf16", "adamw")]
)
def test_moments_of_another_kind_are_refused(saved: str, own: str) -> None:
    with pytest.raises(ValueError, match=f"optimiser is {saved}, this run's {own}; resume with model.optimizer={saved}"):
        check_saved_optimizer({"hyper_parameters": {"optimizer": saved}}, own)
    check_saved_optimizer({"hyper_parameters": {"optimizer": saved}}, saved)
    check_saved_optimizer({"hyper_parameters": {}}, "adamw")  # from before there was a choice


def test_a_rate_is_set_where_it_lies() -> None:
    number, tensor = {"lr": 0.5}, {"lr": torch.tensor(0.5)}
    held = tensor["lr"]
    for group in (number, tensor):
        set_learning_rate(group, 0.25)
        assert group["lr"] == 0.25
    assert tensor["lr"] is held


def test_other_states_pass_as_they_are() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer("adamw", [{"params": [parameter]}], 0.1, (0.9, 0.95), 1e-8)
    parameter.grad = torch.ones(3)
    optimizer.step()
    state = optimizer.state_dict()
    plain = plain_state(state)
    assert plain["param_groups"] == state["param_groups"]
    assert all(plain["state"][0][name] is value for name, value in state["state"][0].items())


def train(folder: Path, stubs: ModuleType, name: str, steps: int, resume: Path | None = None, **options: Any) -> MMRecLightningModule:
    module = stubs.make_module(NETWORK, optimizer=name, decay_steps=20)
    callbacks = [RunCheckpoint(every_n_steps=4), RandomStates()]
    trainer = stubs.make_trainer(folder, callbacks, max_steps=steps, logger=False, precision="bf16-true", **options)
    trainer.fit(module, datamodule=stubs.StubData(), ckpt_path=resume)
    return module


def check_resume(folder: Path, stubs: ModuleType, name: str, **options: Any) -> None:
    whole = train(folder / "whole", stubs, name, 6, **options)
    train(folder / "first", stubs, name, 4, **options)
    checkpoint = folder / "first" / "checkpoints" / "last.ckpt"
    held = torch.load(checkpoint, weights_only=True)
    moments = [value for own in held["optimizer_states"][0]["state"].values() for value in own.values()]
    assert {type(value) for value in moments} == ({Tensor, dict} if name == "adamw_8bit" else {Tensor})
    resumed = train(folder / "second", stubs, name, 6, checkpoint, **options)
    kinds = {type(value).__name__ for own in resumed.trainer.optimizers[0].state.values() for value in own.values()}
    assert ("OptimState8bit" in kinds) == (name == "adamw_8bit")
    for (key, one), other in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(one, other), key


@pytest.mark.parametrize("name", LEAN)
def test_a_resumed_run_is_the_straight_one_to_the_bit(name: str, tmp_path: Path, stubs: ModuleType) -> None:
    """The rounding is stochastic: random states must come back, too."""
    pytest.importorskip("torchao")
    check_resume(tmp_path, stubs, name)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", LEAN)
def test_the_same_on_a_gpu(name: str, tmp_path: Path, stubs: ModuleType) -> None:
    check_resume(tmp_path, stubs, name, accelerator="gpu")


def after_small_steps(name: str, dtype: torch.dtype) -> Tensor:
    """Weights of 1 after 20 steps of 1e-5 each, in fp32."""
    weight = torch.nn.Parameter(torch.ones(64, 1024, dtype=dtype))
    optimizer = make_optimizer(name, [{"params": [weight], "weight_decay": 0.0}], 1e-5, (0.9, 0.95), 1e-8)
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return weight.detach().float()


def test_plain_adamw_leaves_bf16_weights_where_they_are() -> None:
    """Their last bit is 4e-3 below 1: each update is rounded away, all of which together would have been 2e-4."""
    assert torch.equal(after_small_steps("adamw", torch.bfloat16), torch.ones(64, 1024))
    assert torch.allclose(after_small_steps("adamw", torch.float32), torch.tensor(1 - 20e-5), atol=1e-6)


@pytest.mark.parametrize("name", LEAN)
def test_the_lean_ones_move_bf16_weights_in_the_mean_as_fp32_moves(name: str) -> None:
    """By stochastic rounding: one in twenty takes a step of 4e-3."""
    pytest.importorskip("torchao")
    moved = after_small_steps(name, torch.bfloat16)
    expected = after_small_steps("adamw", torch.float32)
    assert (1 - moved.mean()).item() == pytest.approx((1 - expected.mean()).item(), rel=0.1)
    assert 0.02 < (moved != 1).float().mean() < 0.1


def test_8_bit_moments_taken_apart_and_joined_are_the_same() -> None:
    pytest.importorskip("torchao")
    weight = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = make_optimizer("adamw_8bit", [{"params": [weight]}], 1e-3, (0.9, 0.95), 1e-8)
    weight.grad = torch.randn(64, 64)
    optimizer.step()
    state = optimizer.state_dict()
    plain = plain_state(state)
    assert all(isinstance(part, Tensor | bool) for name in ("exp_avg", "exp_avg_sq") for part in plain["state"][0][name].values())
    joined = whole_state(plain)["state"][0]
    for name in ("exp_avg", "exp_avg_sq"):
        before, after = state["state"][0][name], joined[name]
        assert after.signed == before.signed
        assert torch.equal(after.dequantize(), before.dequantize())
    assert type(import_torchao("a test")) is ModuleType


def test_the_memory_table_counts_8_bit_moments() -> None:
    pytest.importorskip("torchao")
    weight = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = make_optimizer("adamw_8bit", [{"params": [weight]}], 1e-3, (0.9, 0.95), 1e-8)
    weight.grad = torch.randn(64, 64)
    optimizer.step()
    counted = category_bytes(torch.nn.ParameterList([weight]), [optimizer])["optimizer state"]
    blocks = 64 * 64 // 256
    assert counted == 2 * (64 * 64 + 4 * blocks + 4 * 256) + 4  # codes, scales and the map of two moments; the count of steps


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "shape"),
    [("adamw_8bit", (64, 64)), ("adamw_8bit", (33, 7)), ("adamw_bf16", (640, 64))],
    ids=["8 bits", "too small for them", "the weights' dtype"],
)
def test_the_kernels_step_is_torchaos(name: str, shape: tuple[int, ...]) -> None:
    """Of fp32 weights, which are not rounded at random; and it goes on from torchao's own state."""
    torchao = pytest.importorskip("torchao.optim")
    weights = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for _ in range(2)]
    weights[1].data.copy_(weights[0].data)
    groups = [[{"params": [weight], "weight_decay": 0.1}] for weight in weights]
    ours = make_optimizer(name, groups[0], 1e-2, (0.9, 0.95), 1e-8)
    theirs = (torchao.AdamW8bit if name == "adamw_8bit" else torchao._AdamW)(
        groups[1], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, bf16_stochastic_round=True
    )
    assert ours.divides_gradients()
    for index in range(6):
        if index == 3:  # as through a checkpoint: loaded as they are, moments would be shared
            ours.load_state_dict(whole_state(copy.deepcopy(plain_state(theirs.state_dict()))))
        gradient = torch.randn(shape, device="cuda")
        for weight, optimizer in zip(weights, (ours, theirs), strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
        # Where a moment lies on a half-way point between two codes either may come out, a part in a hundred of it or less.
        assert (weights[0] - weights[1]).abs().mean() < 1e-6
        assert (weights[0] - weights[1]).abs().max() < 1e-4
    for name, value in ours.state[weights[0]].items():
        other = theirs.state[weights[1]][name]
        assert type(value) is type(other)
        if hasattr(value, "codes"):
            assert (value.codes.int() - other.codes.int()).abs().max() <= 1
            assert (value.codes != other.codes).float().mean() < 1e-2
            assert torch.allclose(value.scale, other.scale, rtol=1e-5)
