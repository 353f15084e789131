"""The wiring of the training module: what is in the loss, what learns, what is logged, what is refused."""

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim import AdamW

from callbacks import AtomicCheckpointIO
from lightning_modules import MMRecLightningModule

TRAINING_TAGS = {"train/loss", "train/loss_main", "train/loss_aux", "train/grad_norm", "train/lr", "train/tokens", "val/loss", "val/ppl"}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar in the event files under `folder`/tb."""
    events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


class Gradients(Callback):
    """Keeps the names of the parameters with a gradient that is not zero."""

    def __init__(self) -> None:
        self.reached: set[str] = set()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.reached |= {name for name, p in pl_module.network.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


@pytest.mark.parametrize("network", [{}, {"planning_loss": "normalized"}, {"use_hem": False, "use_dpg": True}, {"orthogonalize": True}])
def test_every_trainable_parameter_gets_a_gradient(network: dict[str, Any], tmp_path: Path, stubs: ModuleType) -> None:
    module, gradients = stubs.make_module(network), Gradients()
    stubs.make_trainer(tmp_path, [gradients], max_steps=2, logger=False).fit(module, datamodule=stubs.StubData())
    expected = {name for name, parameter in module.network.named_parameters() if parameter.requires_grad}
    frozen = {name for name, _ in module.network.named_parameters()} - expected
    assert gradients.reached == expected
    assert all("W_planning_error" in name for name in frozen)
    assert bool(frozen) == (network.get("planning_loss") == "normalized")


def test_the_auxiliary_loss_is_in_the_total_with_its_weight(tmp_path: Path, stubs: ModuleType) -> None:
    module = stubs.make_module({"lambda_P": 0.05, "planning_loss": "normalized"})
    trainer = stubs.make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, datamodule=stubs.StubData())
    losses = module.step_losses
    assert losses.auxiliary > 0.01
    torch.testing.assert_close(losses.auxiliary, 0.05 * losses.auxiliary_by_layer.sum())
    torch.testing.assert_close(losses.loss, losses.main + losses.auxiliary)
    logged = scalars(tmp_path)
    assert logged["train/loss"][0][1] == pytest.approx(logged["train/loss_main"][0][1] + logged["train/loss_aux"][0][1])


def test_training_follows_the_total(tmp_path: Path, stubs: ModuleType) -> None:
    """The planning projections learn from the auxiliary loss alone, so their gradient scales with its weight."""
    norms: list[float] = []

    class PlanningNorm(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            norms.append(float(pl_module.network.blocks[0].mdi.W_planning_target.weight.grad.norm()))

    for weight in (0.05, 0.1):
        trainer = stubs.make_trainer(tmp_path, [PlanningNorm()], max_steps=1, logger=False)
        trainer.fit(stubs.make_module({"lambda_P": weight}), datamodule=stubs.StubData())
    assert norms[0] > 0
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-4)


def test_the_tags_are_exactly_these_and_the_steps_add_up(tmp_path: Path, stubs: ModuleType) -> None:
    module = stubs.make_module()
    stubs.make_trainer(tmp_path, max_steps=7, log_every_n_steps=2, val_check_interval=4).fit(module, datamodule=stubs.StubData())
    logged = scalars(tmp_path)
    assert logged.keys() == TRAINING_TAGS
    assert [step for step, _ in logged["train/loss"]] == [0, 2, 4, 6]
    assert [step for step, _ in logged["val/loss"]] == [0, 4]
    assert [value for _, value in logged["train/tokens"]] == [steps * 4 * stubs.SEQ_LEN for steps in (1, 3, 5, 7)]
    assert logged["val/loss"][0][1] == pytest.approx(math.log(stubs.VOCAB), rel=0.05)
    for (_, loss), (_, perplexity) in zip(logged["val/loss"], logged["val/ppl"], strict=True):
        assert perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert logged["train/lr"][0][1] == pytest.approx(0.5e-2)


def test_the_loss_falls_in_every_precision(tmp_path: Path, stubs: ModuleType) -> None:
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        module = stubs.make_module()
        data = stubs.StubData(batches=1)  # one batch again and again
        once_an_epoch = {"check_val_every_n_epoch": 1, "val_check_interval": 1.0, "limit_val_batches": 0}
        trainer = stubs.make_trainer(tmp_path / precision, max_steps=25, precision=precision, **once_an_epoch)
        trainer.fit(module, datamodule=data)
        losses = [value for _, value in scalars(tmp_path / precision)["train/loss_main"]]
        assert losses[-1] < 0.7 * losses[0], precision
        expected = torch.bfloat16 if precision == "bf16-true" else torch.float32
        assert module.network.embedding.weight.dtype == expected


class FusedModule(MMRecLightningModule):
    """The optimiser as on a GPU."""

    def configure_optimizers(self) -> Any:
        return AdamW(self.network.parameters(), lr=1e-2, fused=True)

    def on_train_start(self) -> None:
        pass


def test_fused_adamw_is_clipped_in_bf16_mixed(tmp_path: Path, stubs: ModuleType) -> None:
    """Lightning refuses to clip for a fused optimiser there, though no scaler is at work."""
    module = FusedModule(stubs.tiny_config())
    seen: list[float] = []

    class Norms(Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            if grads:
                seen.append(float(torch.nn.utils.get_total_norm(grads)))

    trainer = stubs.make_trainer(tmp_path, [Norms()], precision="bf16-mixed", gradient_clip_val=0.05, logger=False)
    trainer.fit(module, datamodule=stubs.StubData())
    assert seen
    assert seen == pytest.approx([0.05] * len(seen), rel=1e-3)
    assert module.last_gradient_norm > 0.05


def test_the_gradient_norm_is_that_before_clipping(tmp_path: Path, stubs: ModuleType) -> None:
    stubs.make_trainer(tmp_path / "a", max_steps=1).fit(stubs.make_module(), datamodule=stubs.StubData())
    stubs.make_trainer(tmp_path / "b", max_steps=1, gradient_clip_val=1e-3).fit(stubs.make_module(), datamodule=stubs.StubData())
    stubs.make_trainer(tmp_path / "c", max_steps=1, gradient_clip_val=None).fit(stubs.make_module(), datamodule=stubs.StubData())
    module = stubs.make_module()
    module.network.loss(stubs.make_batch([0, 1, 2, 3])).loss.backward()
    expected = float(torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]))
    for run in "abc":
        assert scalars(tmp_path / run)["train/grad_norm"][0][1] == pytest.approx(expected, rel=1e-5)


def test_accumulated_micro_batches_are_one_step(tmp_path: Path, stubs: ModuleType) -> None:
    for run, batch_size, accumulate in (("whole", 8, 1), ("parts", 4, 2)):
        trainer = stubs.make_trainer(tmp_path / run, accumulate_grad_batches=accumulate, max_steps=4, limit_val_batches=0)
        trainer.fit(stubs.make_module(), datamodule=stubs.StubData(batch_size=batch_size))
    whole, parts = scalars(tmp_path / "whole"), scalars(tmp_path / "parts")
    for tag in ("train/loss", "train/grad_norm", "train/lr", "train/tokens"):
        assert parts[tag] == [(step, pytest.approx(value, rel=1e-5)) for step, value in whole[tag]], tag


def test_a_step_that_an_error_broke_off_is_not_in_the_next_runs_losses(tmp_path: Path, stubs: ModuleType) -> None:
    class Fail(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("after the first of two micro-batches")

    module = stubs.make_module()
    options = {"logger": False, "max_steps": 1, "accumulate_grad_batches": 2}
    with pytest.raises(RuntimeError, match="after the first"):
        stubs.make_trainer(tmp_path, [Fail()], **options).fit(module, datamodule=stubs.StubData())
    module.zero_grad()
    stubs.make_trainer(tmp_path, **options).fit(module, datamodule=stubs.StubData())
    fresh = stubs.make_module()
    stubs.make_trainer(tmp_path, **options).fit(fresh, datamodule=stubs.StubData())
    assert torch.equal(module.last_step_loss, fresh.last_step_loss)


def test_several_validation_sources_are_weighted_by_their_tokens(tmp_path: Path, stubs: ModuleType) -> None:
    module = stubs.make_module()
    data = stubs.StubData(validation_sources=2)
    first, second = data.val_dataloader()
    ragged = list(first)
    ragged[1]["labels"][:, 2:] = -1  # 2 of 8 labels count
    data.val_dataloader = lambda: [_Fixed(ragged), second]
    stubs.make_trainer(tmp_path, max_steps=3).fit(module, datamodule=data)
    logged = scalars(tmp_path)
    assert logged.keys() >= {"val/loss", "val/ppl", "val/source0/loss", "val/source0/ppl", "val/source1/loss", "val/source1/ppl"}
    assert logged["val/loss"] == logged["val/source0/loss"] != logged["val/source1/loss"]
    assert [step for step, _ in logged["val/source1/loss"]] == [0, 3]
    with torch.no_grad():
        parts = [module.network.loss(batch) for batch in ragged]
    expected = sum(part.main * part.num_tokens for part in parts) / sum(part.num_tokens for part in parts)
    assert [int(part.num_tokens) for part in parts] == [32, 8]
    assert logged["val/loss"][-1][1] == pytest.approx(float(expected), rel=1e-6)


class _Fixed:
    """A loader over the batches given."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        return iter(self.batches)


def test_validate_test_and_predict(tmp_path: Path, stubs: ModuleType) -> None:
    module, data = stubs.make_module(), stubs.StubData()
    trainer = stubs.make_trainer(tmp_path, logger=False)
    (validated,) = trainer.validate(module, datamodule=data, verbose=False)
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    predicted = trainer.predict(module, datamodule=data)
    assert validated.keys() == {"val/loss", "val/ppl"}
    assert tested["test/loss"] == validated["val/loss"]
    losses = torch.cat([batch["loss"] for batch in predicted])
    assert predicted[0]["log_likelihood"].shape == (4, stubs.SEQ_LEN)
    assert float(losses.mean()) == pytest.approx(validated["val/loss"], rel=1e-5)


def test_the_blocks_are_compiled_and_nothing_else(tmp_path: Path, stubs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(self))
    module = stubs.make_module(compile_blocks=True)
    trainer = stubs.make_trainer(tmp_path, logger=False, max_steps=1)
    trainer.fit(module, datamodule=stubs.StubData())
    trainer.validate(module, datamodule=stubs.StubData(), verbose=False)
    assert compiled == list(module.network.blocks)


def test_lambda_is_annealed(tmp_path: Path, stubs: ModuleType) -> None:
    module = stubs.make_module({"lambda_P": 0.1}, lambda_P_final=0.05, lambda_P_anneal_steps=4)
    stubs.make_trainer(tmp_path, max_steps=3, logger=False).fit(module, datamodule=stubs.StubData())
    assert module.network.lambda_P == pytest.approx(0.075)


@pytest.mark.parametrize("orthogonalize", [False, True])
def test_gradient_statistics_disturb_nothing_and_are_right(orthogonalize: bool, tmp_path: Path, stubs: ModuleType) -> None:
    module = stubs.make_module({"orthogonalize": orthogonalize, "planning_loss": "normalized"})
    module.trainer = stubs.make_trainer(tmp_path, logger=False)
    batch = stubs.make_batch([0, 1])
    random_state = torch.get_rng_state()
    statistics = module.auxiliary_gradient_statistics(batch)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in module.parameters())

    def gradient(part: str) -> dict[str, torch.Tensor]:
        module.zero_grad()
        getattr(module.network.loss(batch), part).backward()
        return {name: p.grad.clone() for name, p in module.network.named_parameters() if p.grad is not None}

    main, total = gradient("main"), gradient("loss")
    flat_main = torch.cat([main[name].flatten() for name in main]).double()
    flat_aux = torch.cat([(total[name] - main[name]).flatten() for name in main]).double()
    assert float(statistics["grad_norm_ratio"]) == pytest.approx(float(flat_aux.norm() / flat_main.norm()), rel=1e-3)
    cosine = torch.nn.functional.cosine_similarity(flat_aux, flat_main, dim=0)
    assert float(statistics["grad_cosine"]) == pytest.approx(float(cosine), abs=1e-3)
    assert 0 < statistics["grad_norm_ratio"] < 10


def test_bad_settings_are_refused_before_training(tmp_path: Path, stubs: ModuleType) -> None:
    module = stubs.make_module()
    with pytest.raises(ValueError, match=r"the tokenizer has 40 tokens but the network 32; set model.network.vocab_size=40"):
        stubs.make_trainer(tmp_path, logger=False).fit(module, datamodule=stubs.StubData(vocab_size=40))
    with pytest.raises(ValueError, match=r"schedule has no end: set trainer.max_steps or model.decay_steps"):
        stubs.make_trainer(tmp_path, logger=False, max_steps=-1, max_epochs=1).fit(module, datamodule=stubs.StubData(batches=2))
    with pytest.raises(ValueError, match=r"trainer.precision=16-true is not supported; choose one of 32-true"):
        stubs.make_trainer(tmp_path, logger=False, precision="16-true").fit(module, datamodule=stubs.StubData())
    assert list(tmp_path.iterdir()) == []


def test_a_token_out_of_range_stops_training(tmp_path: Path, stubs: ModuleType) -> None:
    data = stubs.StubData()
    batches = [stubs.make_batch([0]), stubs.make_batch([1])]
    batches[1]["input_ids"][0, 3] = stubs.VOCAB
    data.train_dataloader = lambda: _Fixed(batches)
    with pytest.raises(ValueError, match="token id 32 in input_ids is out of range"):
        stubs.make_trainer(tmp_path, logger=False, limit_val_batches=0).fit(stubs.make_module(), datamodule=data)


def test_checkpoints_hold_plain_types_and_rebuild_the_module(tmp_path: Path, stubs: ModuleType) -> None:
    module = stubs.make_module({"pe_dim": 8}, betas=(0.8, 0.9))
    trainer = stubs.make_trainer(tmp_path, max_steps=2, logger=False)
    trainer.fit(module, datamodule=stubs.StubData())
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    rebuilt = MMRecLightningModule.load_from_checkpoint(tmp_path / "whole.ckpt", weights_only=True)
    assert rebuilt.config == module.config
    assert rebuilt.hparams == module.hparams
    for name, value in module.state_dict().items():
        assert torch.equal(rebuilt.state_dict()[name], value), name


def test_another_network_is_refused_in_one_line(tmp_path: Path, stubs: ModuleType) -> None:
    trainer = stubs.make_trainer(tmp_path, max_steps=1, logger=False)
    trainer.fit(stubs.make_module(), datamodule=stubs.StubData())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    wider = stubs.make_module({"model_dim": 32})
    with pytest.raises(ValueError, match=r"another network: network.embedding.weight is .*32, 16.*32, 32") as error:
        stubs.make_trainer(tmp_path, logger=False).fit(wider, datamodule=stubs.StubData(), ckpt_path=tmp_path / "a.ckpt")
    assert str(error.value).endswith("it was trained with model.network.model_dim=16")


def test_a_resumed_run_follows_its_own_configuration(tmp_path: Path, stubs: ModuleType) -> None:
    trainer = stubs.make_trainer(tmp_path, max_steps=2, logger=False)
    trainer.fit(stubs.make_module(), datamodule=stubs.StubData())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    module = stubs.make_module(learning_rate=1e-3, weight_decay=0.3, betas=(0.8, 0.85), warmup_steps=0, min_learning_rate_ratio=1.0)
    resumed = stubs.make_trainer(tmp_path, max_steps=4, plugins=[AtomicCheckpointIO()])
    resumed.fit(module, datamodule=stubs.StubData(), ckpt_path=tmp_path / "a.ckpt")
    assert scalars(tmp_path)["train/lr"] == [(2, pytest.approx(1e-3)), (3, pytest.approx(1e-3))]
    decay, no_decay = resumed.optimizers[0].param_groups
    assert (decay["weight_decay"], no_decay["weight_decay"], decay["betas"]) == (0.3, 0.0, (0.8, 0.85))
    assert module.tokens_seen == 4 * 4 * stubs.SEQ_LEN
