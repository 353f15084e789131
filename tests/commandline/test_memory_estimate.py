"""The estimate of memory against what a network on the CPU really holds: layers of both kinds, and UBÖO's part in them."""

import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mmrec.commandline.memory_estimate import Estimate, estimate
from mmrec.config import MMRecConfig
from mmrec.model import MMRecModel

SIZES = {"vocab_size": 48, "model_dim": 64, "num_layers": 4, "num_heads": 1, "ffn_dim": 64, "loss_chunk_size": 32}
BATCH, TIME = 3, 64
LAYERS = [
    {"planning_loss": "mse"},
    {"planning_loss": "mse", "planning_error_dim": 16, "planning_layers": "last"},
    {"planning_loss": "normalized", "planning_error_dim": 32},
    {"planning_loss": "normalized", "planning_layers": "last"},
]
KINDS = {
    "matrix": {"window_every": None},
    "window": {"window_every": 1},
    "window without convolutions": {"window_every": 1, "window_conv": 1},
}
DECAYS = [{}, {"use_dpg": True, "dpg_rank": 48}, {"state_gate": False}, {"state_gate": False, "use_dpg": True, "dpg_rank": 48}]


class Held(TorchDispatchMode):
    """Bytes of the tensors made within it that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [tensor.untyped_storage()._cdata for tensor in tree_iter((args, kwargs)) if isinstance(tensor, torch.Tensor)]
        made = function(*args, **(kwargs or {}))
        for tensor in tree_iter(made):  # a view holds nothing of its own
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in (*given, *self._known):
                storage = tensor.untyped_storage()
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return made

    def _gone(self, which: int, size: int) -> None:
        self._known.discard(which)
        self.now -= size


def estimated(precision: str, fields: Mapping[str, Any]) -> Estimate:
    data = {"init_args": {"batch_size": BATCH, "seq_len": TIME}}
    return estimate("x", {"trainer": {"precision": precision}, "model": {"network": {**SIZES, **fields}}, "data": data})


def held_after_the_forward(precision: str, fields: Mapping[str, Any]) -> int:
    torch.manual_seed(0)
    network = MMRecModel(MMRecConfig(**{**SIZES, **fields}))
    network = network.to(torch.bfloat16) if precision == "bf16-true" else network
    ids = torch.randint(SIZES["vocab_size"], (BATCH, TIME))
    with Held() as held:
        losses = network.loss({"input_ids": ids, "labels": ids})
    assert losses.loss.requires_grad  # and holds what it was made of
    return held.now


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("use_uboo", [True, False])
@pytest.mark.parametrize("checkpointing", [False, "selective"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decay", DECAYS, ids=str)
def test_what_a_layer_keeps_for_the_backward_is_counted(
    decay: dict[str, Any], kind: str, checkpointing: bool | str, use_uboo: bool, precision: str
) -> None:
    fields = {**decay, **KINDS[kind], "activation_checkpointing": checkpointing, "use_uboo": use_uboo, "model_dim": 128}  # in one head
    deeper = {**fields, "num_layers": SIZES["num_layers"] + 1}
    held = held_after_the_forward(precision, deeper) - held_after_the_forward(precision, fields)
    counted = estimated(precision, deeper).activations - estimated(precision, fields).activations
    kept = not checkpointing or not fields.get("state_gate", True)
    if kind == "matrix" and precision == "bf16-true" and kept:
        counted -= BATCH * TIME * 4 * 128  # memories between chunks, which a kernel alone keeps
    assert counted == pytest.approx(held, rel=0.005)  # what is a number a head is not counted


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("fields", LAYERS, ids=lambda fields: " ".join(map(str, fields.values())))
def test_what_uboo_keeps_for_the_backward_is_counted(fields: dict[str, Any], precision: str) -> None:
    off = {"use_uboo": False}
    held = held_after_the_forward(precision, fields) - held_after_the_forward(precision, off)
    counted = estimated(precision, fields).activations - estimated(precision, off).activations
    assert counted == pytest.approx(held, rel=0.05)


@pytest.mark.parametrize("fields", [{"use_uboo": False}, *LAYERS], ids=lambda fields: " ".join(map(str, fields.values())))
def test_parameters_are_exact_and_frozen_ones_have_weights_alone(fields: dict[str, Any]) -> None:
    network = MMRecModel(MMRecConfig(**{**SIZES, **fields}))
    row = estimated("32-true", fields)
    assert row.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert row.parameters_inference == sum(value.numel() for value in MMRecModel(**SIZES, use_uboo=False).parameters())
    assert row.weights == 4 * row.parameters
    ids = torch.randint(SIZES["vocab_size"], (1, 8))
    network.loss({"input_ids": ids, "labels": ids}).loss.backward()
    trained = sum(parameter.grad.numel() for parameter in network.parameters() if parameter.grad is not None)
    assert (row.gradients, row.optimizer) == (4 * trained, 8 * trained)
    assert (trained < row.parameters) == (fields.get("planning_loss") == "normalized")


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_recomputed_blocks_keep_their_inputs(precision: str) -> None:
    checkpointed = {"activation_checkpointing": True, "use_uboo": False}
    deeper = {**checkpointed, "num_layers": SIZES["num_layers"] + 3}
    held = held_after_the_forward(precision, deeper) - held_after_the_forward(precision, checkpointed)
    counted = estimated(precision, deeper).activations - estimated(precision, checkpointed).activations
    assert counted == pytest.approx(held, rel=0.005)


def test_of_recomputed_blocks_the_largest_is_there() -> None:
    def largest(**fields: Any) -> int:
        return estimated("32-true", {"activation_checkpointing": True, **fields}).activations

    number = BATCH * TIME * SIZES["model_dim"] * 4
    off, matrix = largest(use_uboo=False), largest(use_uboo=False, window_every=None)
    assert largest(use_uboo=False, window_every=1) == off == matrix + 2 * number  # q and k convolved
    # One planning error at most, which adds two numbers a channel: the window's, where it has one, or the last layer's.
    assert largest() == largest(num_layers=4, window_every=4, planning_layers="last") == off + 2 * number
    assert largest(planning_layers="last") == off
    assert largest(window_every=None, planning_layers="last") == matrix + 2 * number
