"""UBÖO's options: which target, in which layers; and what all forms have in common."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import assert_same
from torch._subclasses.fake_tensor import FakeTensorMode

from callbacks import AuxiliaryLossCurves
from mmrec.config import MMRecConfig
from mmrec.model import MMRecModel

VOCAB, B, T, D, E = 37, 2, 23, 32, 5
FORMS: dict[str, dict[str, Any]] = {
    "mse of the last": {"planning_layers": "last"},
    "normalized": {"planning_loss": "normalized"},
    "mean": {"planning_loss": "normalized", "planning_reduction": "mean"},
    "orthogonal": {"planning_loss": "normalized", "planning_layers": "last", "orthogonalize": True},
}
every_form = pytest.mark.parametrize("fields", FORMS.values(), ids=FORMS)


def small(**fields) -> MMRecModel:
    return MMRecModel(
        **{"vocab_size": VOCAB, "model_dim": D, "num_layers": 3, "num_heads": 2, "pe_dim": 8, "planning_error_dim": E, **fields}
    )


def batch(packed: bool = True) -> dict[str, torch.Tensor]:
    tokens = torch.randint(VOCAB, (B, T + 1))
    found = {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}
    return found | ({"reset": torch.rand(B, T) < 0.1} if packed else {})


def disturb(model: MMRecModel) -> MMRecModel:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(("planning_layers", "planned"), [("all", [0, 1, 2, 3, 4]), ("last", [4])])
def test_only_the_chosen_layers_have_projections_and_a_loss(planning_layers: str, planned: list[int]) -> None:
    fields = {"num_layers": 5, "planning_loss": "normalized", "planning_layers": planning_layers}
    model, one = disturb(small(**fields)), batch()
    names = {name for name in model.state_dict() if "W_planning" in name}
    assert names == {f"blocks.{index}.mdi.W_planning_{kind}.weight" for index in planned for kind in ("error", "target")}
    assert [index for index, block in enumerate(model.blocks) if block.mdi.use_uboo] == planned
    assert model.num_parameters() - model.num_parameters(training_only=False) == 2 * len(planned) * D * E
    assert model.flops_per_token(T) - small(num_layers=5, use_uboo=False).flops_per_token(T) == 6 * 2 * len(planned) * D * E
    out = model.loss(one, diagnostics=True)
    assert out.auxiliary_by_layer.nonzero().flatten().tolist() == planned
    assert_same(out.auxiliary, model.lambda_P * out.auxiliary_by_layer.sum())
    for name in ("target_variance", "target_effective_rank"):
        assert out.diagnostics[name].nonzero().flatten().tolist() == planned
    mean = small(**fields, planning_reduction="mean")
    mean.load_state_dict(model.state_dict())
    assert_same(mean.loss(one).auxiliary, out.auxiliary / len(planned))
    assert_same(mean(one["input_ids"], reset=one["reset"], return_auxiliary_loss=True)[1], out.auxiliary / len(planned))


def test_a_layer_s_planning_error_does_not_depend_on_which_others_have_one() -> None:
    every, one = disturb(small(planning_loss="normalized")), batch()
    last = small(planning_loss="normalized", planning_layers="last")
    last.load_state_dict({name: value for name, value in every.state_dict().items() if name in last.state_dict()})
    assert torch.equal(last.loss(one).auxiliary_by_layer[-1], every.loss(one).auxiliary_by_layer[-1])


@every_form
def test_every_trainable_parameter_gets_a_gradient(fields: dict[str, Any]) -> None:
    model = disturb(small(**fields))
    model.loss(batch()).loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or p.grad.norm() == 0}
    assert without == {name for name, p in model.named_parameters() if not p.requires_grad}
    assert all("W_planning_error" in name for name in without)


@every_form
def test_what_only_training_needs_changes_no_other_weight_and_is_not_exported(fields: dict[str, Any]) -> None:
    torch.manual_seed(4)
    plain, drawn = small(use_uboo=False), torch.rand(1)
    torch.manual_seed(4)
    model, drawn_too = small(**fields), torch.rand(1)
    exported = model.inference_state_dict()
    assert exported.keys() == plain.state_dict().keys()
    assert all(torch.equal(exported[name], value) for name, value in plain.state_dict().items())
    assert torch.equal(drawn, drawn_too)
    assert model.num_parameters(training_only=False) == plain.num_parameters() < model.num_parameters()
    extra = [value for name, value in model.state_dict().items() if name not in exported]
    assert all(abs(weight.std() / 0.02 - 1) < 0.2 for weight in extra)
    distinct = {float(weight.flatten()[0]) for weight in extra}
    assert len(distinct) == len(extra)


@every_form
def test_packed_documents_recomputation_and_chunks_of_logits_change_nothing(fields: dict[str, Any]) -> None:
    one, results = batch(), []
    for options in ({}, {"activation_checkpointing": True}, {"activation_checkpointing": "selective", "loss_chunk_size": 5}):
        torch.manual_seed(2)
        model = disturb(small(**fields, **options).double())
        out = model.loss(one)
        out.loss.backward()
        results.append((out.loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    for again in results[1:]:
        for actual, expected in zip(again, results[0], strict=True):
            assert_same(actual, expected)


@every_form
def test_a_loss_asks_for_no_value_on_the_host(fields: dict[str, Any]) -> None:
    """Fake tensors have none: what a CUDA graph could not capture, since the host waits for it, is an error."""
    model, one = small(**fields), batch()
    trained = [p for p in model.parameters() if p.requires_grad]
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.autograd.grad(model.loss(one).loss, trained)


@every_form
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_trains(fields: dict[str, Any], precision: str, tmp_path: Path, stubs: ModuleType) -> None:
    module = stubs.make_module({"lambda_P": 0.1, **fields})
    curves = AuxiliaryLossCurves(diagnostics_every_n_steps=2, gradients_every_n_steps=2)
    trainer = stubs.make_trainer(tmp_path, [curves], max_steps=4, precision=precision)
    trainer.fit(module, datamodule=stubs.StubData())
    losses = module.step_losses
    assert losses.auxiliary.isfinite()
    assert losses.auxiliary > 0
    assert losses.auxiliary_by_layer.shape == (2,)
    torch.testing.assert_close(losses.loss, losses.main + losses.auxiliary)
    statistics = module.auxiliary_gradient_statistics(stubs.make_batch([0, 1]))
    assert statistics["grad_norm_ratio"] > 0
    assert -1 <= statistics["grad_cosine"] <= 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"planning_layers": "first"}, "planning_layers is 'first'; choose one of all, last"),
        ({"planning_loss": "order"}, "planning_loss is 'order'; choose one of mse, normalized"),
    ],
)
def test_a_form_that_there_is_not_is_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        MMRecConfig(**fields)
    assert "\n" not in str(error.value)
