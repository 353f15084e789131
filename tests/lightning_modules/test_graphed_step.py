"""A step replayed from a CUDA graph is the step: losses, gradients, batches of other shapes, an annealed λ_P, packed documents."""

import functools
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import assert_same
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

from lightning_modules.graphed_step import GraphedStep
from mmrec.baselines import BaselineConfig, BaselineModel
from mmrec.model import MMRecModel

# What studies train beside the plain network, by the fields that differ; None: a Transformer++.
OTHERS: dict[str, dict[str, Any] | None] = {"windows": {"window_every": 2, "window": 8}, "transformer": None}


def make_network(fields: dict[str, Any] | None) -> MMRecModel | BaselineModel:
    """Two layers of width 128, without a planning error unless asked for."""
    sizes: dict[str, Any] = {"vocab_size": 50, "model_dim": 128, "num_layers": 2, "num_heads": 2}
    if fields is None:
        return BaselineModel(BaselineConfig(ffn_dim=256, **sizes))
    return MMRecModel(**sizes | {"use_uboo": False} | fields)


def batch(length: int, seed: int, packed: bool, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(50, (2, length + 1), generator=generator)
    found = {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}
    if packed:
        found["reset"] = torch.rand(2, length, generator=generator) < 0.1
    return {name: tensor.to(device) for name, tensor in found.items()}


def trained(network: MMRecModel | BaselineModel) -> dict[str, Tensor]:
    """Parameters by name; those of layers that plan nothing are frozen."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def of_autograd(
    network: MMRecModel | BaselineModel, one: dict[str, Tensor], scale: float
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Loss, layers' planning errors and gradients. In a function: a graph of autograd's that is alive, made on another stream, would
    have its accumulation nodes reused within the capture, which CUDA refuses."""
    with torch.autocast("cuda", torch.bfloat16):
        truth = network.loss(one)
    gradients = torch.autograd.grad(truth.loss * scale, list(trained(network).values()), allow_unused=True)
    return truth.loss.detach(), truth.auxiliary_by_layer.detach(), gradients


@pytest.mark.gpu
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_uboo": True, "orthogonalize": True},
        {"use_uboo": True, "planning_loss": "normalized", "planning_layers": "last"},
        {"activation_checkpointing": True},
        {"activation_checkpointing": "selective"},
        *OTHERS.values(),
    ],
    ids=["plain", "planned", "last", "recomputed", "selective", *OTHERS],
)
def test_replayed_gradients_are_those_of_autograd(micro_batches: int, fields: dict[str, Any] | None) -> None:
    torch.manual_seed(0)
    network = make_network(fields).to("cuda")
    limit = 1e-3 if fields is None else None  # torch's attention sums its gradients in no fixed order
    step = GraphedStep(network)
    lengths = [32, 32, 32, 48, 32, 48, 48, 32, 48]  # of a step's batches: each shape is captured once
    for index, length in enumerate(lengths):
        network.lambda_P = 0.1 * (index + 1)
        packed = index % 4 == 0 and fields is not None  # a baseline does not know documents
        batches = [batch(length, 10 * index + part, packed, "cuda") for part in range(micro_batches)]
        with torch.autocast("cuda", torch.bfloat16):
            outputs = [step.run(one, part == 0, 1 / micro_batches) for part, one in enumerate(batches)]
        actual = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        parameters = trained(network)
        expected = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for one, output in zip(batches, outputs, strict=True):
            loss, by_layer, gradients = of_autograd(network, one, 1 / micro_batches)
            assert_same(output.loss, loss)
            assert_same(output.auxiliary_by_layer, by_layer, limit=1e-3)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    expected[name] += gradient
        assert set(actual) == {name for name, value in expected.items() if value.any()}
        for name, gradient in actual.items():
            assert_same(gradient, expected[name], what=name, limit=limit)
        with torch.no_grad():  # what an optimiser does: in place
            for parameter in network.parameters():
                parameter.mul_(0.99)
    assert len(step._captured) >= 2
    step.close()
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.gpu
def test_gradients_that_others_cleared_are_there_again() -> None:
    torch.manual_seed(0)
    network = MMRecModel(vocab_size=50, model_dim=64, num_layers=1, num_heads=1, use_uboo=False).to("cuda")
    step = GraphedStep(network)
    for index, length in enumerate([16, 16, 16, 16, 24, 16]):  # captured at the third; the fifth, of another length, runs without
        network.zero_grad()
        one = batch(length, index, False, "cuda")
        with torch.autocast("cuda", torch.bfloat16):
            step.run(one, True, 1.0)
        _, _, expected = of_autograd(network, one, 1.0)
        for parameter, gradient in zip(network.parameters(), expected, strict=True):
            if gradient is not None:
                assert parameter.grad is not None
                assert_same(parameter.grad, gradient)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("validated", "fields"),
    [(False, {}), (True, {}), (True, {"model_dim": 128, "window_every": 2, "window": 4}), (True, None)],
    ids=["plain", "validated", *OTHERS],
)
def test_training_with_a_graph_ends_where_training_without_does(
    tmp_path: Path, stubs: ModuleType, validated: bool, fields: dict[str, Any] | None
) -> None:
    """Also where it is validated in between: Lightning clears the gradients then."""
    ends = []
    limit = 1e-2 if fields is None else None  # torch's attention sums its gradients in no fixed order, and Adam divides by small ones
    for cuda_graph in (False, True):
        make = stubs.make_baseline if fields is None else functools.partial(stubs.make_module, fields)
        module = make(cuda_graph=cuda_graph)
        options = {"accelerator": "gpu", "precision": "bf16-mixed", "max_steps": 8, "accumulate_grad_batches": 2}
        options |= {"limit_val_batches": int(validated)} | ({"val_check_interval": 6} if validated else {})
        trainer = stubs.make_trainer(tmp_path / str(cuda_graph), [], **options)
        batches = [stubs.make_batch(list(range(4 * index, 4 * index + 4))) for index in range(16)]
        trainer.fit(module, *(DataLoader(part, batch_size=None) for part in (batches, batches[:1])))
        assert trainer.global_step == 8
        assert module._graphed is None
        ends.append([p.detach().cpu() for p in module.parameters()])
    for graphed, plain in zip(*reversed(ends), strict=True):
        assert_same(graphed, plain, limit=limit)


@pytest.mark.parametrize("fields", OTHERS.values(), ids=OTHERS)
def test_what_is_captured_asks_for_no_value_on_the_host(fields: dict[str, Any] | None) -> None:
    """Fake tensors have none: to read one, for which a GPU would be waited, is an error. Other forms: test_planning_forms."""
    network, one = make_network(fields), batch(32, 0, fields is not None, "cpu")
    trained = [p for p in network.parameters() if p.requires_grad]
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.autograd.grad(network.loss(one).loss, trained)


@pytest.mark.parametrize("kind", ["plain", *OTHERS])
def test_on_a_cpu_nothing_is_captured(kind: str, tmp_path: Path, stubs: ModuleType) -> None:
    fields = OTHERS.get(kind, {})
    module = stubs.make_baseline(cuda_graph=True) if fields is None else stubs.make_module(fields, cuda_graph=True)
    trainer = stubs.make_trainer(tmp_path, [], max_steps=2, limit_val_batches=0)
    trainer.fit(module, DataLoader([stubs.make_batch([0, 1])] * 2, batch_size=None))
    assert trainer.global_step == 2
    assert module._graphed is None
