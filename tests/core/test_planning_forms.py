"""UBÖO's options: how far ahead, in which layers, against which target; and what all forms have in common."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from support import assert_same, relative_error
from torch._subclasses.fake_tensor import FakeTensorMode

from callbacks import AuxiliaryLossCurves
from mmrec.blocks.mm_rec_block import MMRecBlock
from mmrec.config import MMRecConfig
from mmrec.core import uboo
from mmrec.model import MMRecModel

VOCAB, B, T, D, E = 37, 2, 23, 32, 5
FORMS: dict[str, dict[str, Any]] = {
    "mse of the last": {"planning_horizon": 2, "planning_layers": "last"},
    "horizon": {"planning_loss": "normalized", "planning_horizon": 4},
    "upper": {"planning_loss": "normalized", "planning_layers": "upper", "planning_reduction": "mean"},
    "orthogonal": {"planning_loss": "normalized", "planning_layers": "last", "planning_horizon": 3, "orthogonalize": True},
    "ema": {"planning_loss": "ema"},
    "decode": {"planning_loss": "decode"},
    "order": {"planning_loss": "order"},
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


@pytest.mark.parametrize("planning_loss", ["mse", "normalized", "ema"])
@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_a_horizon_predicts_from_so_many_tokens_back_in_the_same_document(planning_loss: str, horizon: int) -> None:
    one = MMRecBlock(model_dim=D, num_heads=2, planning_error_dim=E, planning_loss=planning_loss, planning_horizon=horizon).double()
    h = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[0, [0, 7, 9]] = True
    W_pe, W_pt = one.mdi.W_planning_error.weight, one.mdi.W_planning_target.weight
    errors = []
    for b in range(B):
        for t in range(horizon, T):
            if reset[b, t - horizon + 1 : t + 1].any():
                continue
            updated, planned = W_pe @ h[b, t].detach(), W_pt @ h[b, t - horizon]
            errors.append(updated - planned if planning_loss == "mse" else uboo.rms(planned) - uboo.rms(updated).detach())
    expected = torch.stack(errors).square().mean()
    loss = one.planning_error(h, h, None, reset)
    assert loss.numbers == len(errors) * E
    assert_same(loss.mean(), expected)
    trained = [h, W_pt] + [W_pe] * (planning_loss == "mse")
    found, truth = torch.autograd.grad(loss.mean(), trained), torch.autograd.grad(expected, trained)
    for actual, wanted in zip(found, truth, strict=True):
        assert_same(actual, wanted)
    assert not found[0][:, -horizon:].any()  # nothing of the states predicted


@pytest.mark.parametrize("planning_loss", ["mse", "normalized"])
def test_a_horizon_beyond_the_sequence_leaves_nothing_to_predict(planning_loss: str) -> None:
    one = MMRecBlock(model_dim=D, num_heads=2, planning_loss=planning_loss, planning_horizon=9)
    for time in (1, 8, 9):
        h = torch.randn(B, time, D, requires_grad=True)
        loss = one.planning_error(h, h, None, None)
        loss.mean().backward()
        assert (loss.mean(), loss.numbers) == (0, 0)
        assert not h.grad.any()


@pytest.mark.parametrize(("planning_layers", "planned"), [("all", [0, 1, 2, 3, 4]), ("upper", [2, 3, 4]), ("last", [4])])
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
    every, one = disturb(small(planning_loss="normalized", planning_horizon=2)), batch()
    last = small(planning_loss="normalized", planning_horizon=2, planning_layers="last")
    last.load_state_dict({name: value for name, value in every.state_dict().items() if name in last.state_dict()})
    assert torch.equal(last.loss(one).auxiliary_by_layer[-1], every.loss(one).auxiliary_by_layer[-1])


def test_the_average_starts_where_it_follows_and_moves_a_hundredth_a_step() -> None:
    model = small(planning_loss="ema", planning_layers="upper")
    planned = [block.mdi for block in model.blocks[1:]]
    for mdi in planned:
        assert torch.equal(mdi.W_planning_error.weight, mdi.W_planning_target.weight)
        assert not mdi.W_planning_error.weight.requires_grad
    disturb(model)
    expected = [0.99 * mdi.W_planning_error.weight + 0.01 * mdi.W_planning_target.weight for mdi in planned]
    targets = [mdi.W_planning_target.weight.clone() for mdi in planned]
    model.after_step()
    for mdi, average, target in zip(planned, expected, targets, strict=True):
        assert_same(mdi.W_planning_error.weight, average)
        assert torch.equal(mdi.W_planning_target.weight, target)


@pytest.mark.parametrize("planning_loss", ["mse", "normalized", "decode", "order"])
def test_nothing_moves_after_a_step_of_another_form(planning_loss: str) -> None:
    model = disturb(small(planning_loss=planning_loss))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.after_step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Followed(Callback):
    """The moving average as it should be, from the weights that it follows as each optimiser step leaves them."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.expected, self.step = pl_module.network.blocks[0].mdi.W_planning_error.weight.clone(), 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            self.expected = self.expected.lerp(pl_module.network.blocks[0].mdi.W_planning_target.weight.detach(), 0.01)


def test_in_training_the_average_moves_once_an_optimiser_step(tmp_path: Path, stubs: ModuleType) -> None:
    module, followed = stubs.make_module({"planning_loss": "ema"}), Followed()
    trainer = stubs.make_trainer(tmp_path, [followed], max_steps=5, accumulate_grad_batches=2, logger=False)
    trainer.fit(module, datamodule=stubs.StubData())
    mdi = module.network.blocks[0].mdi
    assert followed.step == 5
    assert_same(mdi.W_planning_error.weight, followed.expected)
    assert relative_error(mdi.W_planning_error.weight, mdi.W_planning_target.weight) > 1e-2


def test_an_average_that_bf16_would_hold_still_is_refused(tmp_path: Path, stubs: ModuleType) -> None:
    trainer = stubs.make_trainer(tmp_path, max_steps=1, precision="bf16-true", logger=False, limit_val_batches=0)
    with pytest.raises(ValueError, match=r"in bf16-true its steps are lost to rounding; set trainer\.precision=bf16-mixed$") as error:
        trainer.fit(stubs.make_module({"planning_loss": "ema"}), datamodule=stubs.StubData())
    assert "\n" not in str(error.value)
    trainer.fit(stubs.make_module({"planning_loss": "ema", "use_uboo": False}), datamodule=stubs.StubData())


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
    assert len(distinct) == len(extra) // (2 if fields.get("planning_loss") == "ema" else 1)


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
        model.after_step()


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
        ({"planning_horizon": 0}, "planning_horizon is 0; give a whole number of at least 1"),
        ({"planning_layers": "first"}, "planning_layers is 'first'; choose one of all, upper, last"),
        ({"planning_loss": "decode", "orthogonalize": True}, "orthogonalize is of losses of a block's h, planning_loss 'decode' has none"),
        ({"planning_loss": "order", "planning_horizon": 2}, "planning_horizon is of losses of a block's h, planning_loss 'order' has none"),
        ({"planning_loss": "order", "planning_layers": "last"}, "planning_layers is of losses of a block's h"),
    ],
)
def test_options_that_do_not_go_together_are_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        MMRecConfig(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("planning_loss", ["decode", "order"])
def test_a_loss_above_the_blocks_needs_the_training_loss(planning_loss: str) -> None:
    model, ids = small(planning_loss=planning_loss), batch()["input_ids"]
    assert model(ids).shape == (B, T, VOCAB)
    with pytest.raises(ValueError, match=f"planning_loss '{planning_loss}' is formed with the training loss alone; call loss"):
        model(ids, return_auxiliary_loss=True)
