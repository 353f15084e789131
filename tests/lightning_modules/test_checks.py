"""Bad input: one line that names the fault and the remedy."""

import re
from dataclasses import asdict, replace
from types import ModuleType
from typing import Any

import pytest
import torch

from lightning_modules import BaselineLightningModule
from lightning_modules.checks import check_batch_form, check_checkpoint_shapes, check_token_range, check_vocabulary
from mmrec.baselines import BaselineConfig
from mmrec.model import MMRecModel


def batch(**changes: Any) -> dict[str, Any]:
    return {"input_ids": torch.zeros(2, 3, dtype=torch.int64), "labels": torch.zeros(2, 3, dtype=torch.int64)} | changes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1, 2], "a batch needs input_ids and labels, found list; correct the data module"),
        ({"input_ids": torch.zeros(1, 1)}, "a batch needs input_ids and labels, found input_ids; correct the data module"),
        (batch(input_ids=torch.zeros(2, 0, dtype=torch.int64)), r"input_ids have the shape \(2, 0\); a batch is \(B, T\)"),
        (batch(labels=torch.zeros(2, 4, dtype=torch.int64)), r"labels have the shape \(2, 4\), input_ids \(2, 3\); they must agree"),
        (batch(labels=torch.zeros(2, 3)), "input_ids are torch.int64 and labels torch.float32; both must be torch.int64"),
    ],
)
def test_the_form_of_a_batch(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        check_batch_form(given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "value"), [("input_ids", -1), ("input_ids", 32), ("labels", -2), ("labels", 32)])
def test_token_ids_out_of_range(name: str, value: int) -> None:
    faulty = batch()
    faulty[name] = faulty[name].clone()
    faulty[name][1, 2] = value
    with pytest.raises(ValueError, match=rf"token id {value} in {name} is out of range: the network knows .* 31; set model.network"):
        check_token_range(faulty, 32)


def test_the_ends_of_the_range_are_fine() -> None:
    check_token_range(batch(input_ids=torch.tensor([[0, 31]]), labels=torch.tensor([[-1, 31]])), 32)
    check_vocabulary(None, 32)
    check_vocabulary(32, 32)


def test_vocabularies_that_differ() -> None:
    with pytest.raises(ValueError, match=r"the tokenizer has 40 tokens but the network 32; set model.network.vocab_size=40"):
        check_vocabulary(40, 32)


def test_a_checkpoint_of_another_shape_names_the_first_parameter_and_the_setting(stubs: ModuleType) -> None:
    saved, wanted = MMRecModel(stubs.tiny_config()), MMRecModel(stubs.tiny_config(vocab_size=40))
    checkpoint = {"state_dict": saved.state_dict(), "hyper_parameters": {"network": {"vocab_size": 32, "model_dim": 16}}}
    expected = (
        "the checkpoint is of another network: embedding.weight is (32, 16) there and (40, 16) here; "
        "it was trained with model.network.vocab_size=32"
    )
    with pytest.raises(ValueError, match="another network") as error:
        check_checkpoint_shapes(checkpoint, wanted, wanted.config)
    assert str(error.value) == expected


def test_missing_and_unknown_parameters_are_named(stubs: ModuleType) -> None:
    shallow, deep = MMRecModel(stubs.tiny_config(num_layers=1)), MMRecModel(stubs.tiny_config(num_layers=2))
    with pytest.raises(ValueError, match=r"blocks\.1\.\S+ is not in it; use the configuration it was trained with"):
        check_checkpoint_shapes({"state_dict": shallow.state_dict()}, deep, deep.config)
    with pytest.raises(ValueError, match=r"blocks\.1\.\S+ is unknown to this network"):
        check_checkpoint_shapes({"state_dict": deep.state_dict()}, shallow, shallow.config)
    check_checkpoint_shapes({"state_dict": deep.state_dict()}, deep, deep.config)


def test_a_checkpoint_from_before_the_embedding_was_scaled_says_how_to_go_on() -> None:
    network = MMRecModel(vocab_size=16, model_dim=8, num_layers=1, use_uboo=False)
    earlier = {"state_dict": network.state_dict(), "hyper_parameters": {"network": {"model_dim": 8}}}
    with pytest.raises(ValueError, match=r"embedding_scale is 1\.0 there and null here; set model\.network\.embedding_scale=1\.0$"):
        check_checkpoint_shapes(earlier, network, network.config)
    check_checkpoint_shapes(earlier, network, replace(network.config, embedding_scale=1.0))
    now = {**earlier, "hyper_parameters": {"network": asdict(network.config)}}
    check_checkpoint_shapes(now, network, network.config)


@pytest.mark.parametrize(
    ("common", "there", "here", "message"),
    [
        ({"window_every": 2}, {"window": 8}, {}, "window is 8 there and 512 here; set model.network.window=8"),
        ({}, {}, {"norm_eps": 1e-5}, "norm_eps is 1e-06 there and 1e-05 here; set model.network.norm_eps=1e-06"),
        ({}, {"embedding_scale": None}, {"embedding_scale": 1.0}, "embedding_scale is null there and 1.0 here; set model.network.em"),
        ({}, {"state_gate": False}, {}, "state_gate is false there and true here; set model.network.state_gate=false"),
        ({}, {"tie_embeddings": False}, {}, "tie_embeddings is false there and true here; set model.network.tie_embeddings=false"),
        ({}, {"planning_loss": "normalized"}, {}, "planning_loss is normalized there and mse here; set model.network.planning_loss=norm"),
    ],
)
def test_what_no_shape_shows_is_compared(
    common: dict[str, Any], there: dict[str, Any], here: dict[str, Any], message: str, stubs: ModuleType
) -> None:
    saved, wanted = MMRecModel(stubs.tiny_config(**common, **there)), MMRecModel(stubs.tiny_config(**common, **here))
    checkpoint = {"state_dict": saved.state_dict(), "hyper_parameters": {"network": asdict(saved.config)}}
    with pytest.raises(ValueError, match=f"^the checkpoint is of another network: {re.escape(message)}") as error:
        check_checkpoint_shapes(checkpoint, wanted, wanted.config)
    assert "\n" not in str(error.value)
    check_checkpoint_shapes(checkpoint, saved, saved.config)


def test_the_same_function_written_otherwise_is_no_other_network(stubs: ModuleType) -> None:
    network = MMRecModel(stubs.tiny_config())
    written = asdict(network.config) | {"window": 8}  # there is no window
    checkpoint = {"state_dict": network.state_dict(), "hyper_parameters": {"network": written}}
    check_checkpoint_shapes(checkpoint, network, replace(network.config, embedding_scale=4.0))  # √16
    older = {name: value for name, value in written.items() if name not in ("norm_eps", "state_gate", "planning_loss")}
    checkpoint["hyper_parameters"] = {"network": older | {"a_field_that_is_gone": 1}}
    check_checkpoint_shapes(checkpoint, network, network.config)
    plain = MMRecModel(stubs.tiny_config(use_uboo=False, planning_loss="normalized"))  # without a planning error its form means nothing
    checkpoint = {"state_dict": plain.state_dict(), "hyper_parameters": {"network": asdict(plain.config)}}
    check_checkpoint_shapes(checkpoint, plain, replace(plain.config, planning_loss="mse"))


def test_forms_of_uboo_that_are_gone_are_named_only_where_they_matter(stubs: ModuleType) -> None:
    planned, plain = (MMRecModel(stubs.tiny_config(use_uboo=use_uboo)) for use_uboo in (True, False))
    for network, gone, message in (
        (planned, {"planning_loss": "ema"}, "planning_loss is 'ema'; choose one of mse, normalized"),
        (planned, {"planning_horizon": 4}, "it was trained with planning_horizon=4, which is gone; set model.network.use_uboo=false"),
        (planned, {"planning_horizon": 1}, None),
        (plain, {"planning_loss": "ema", "planning_horizon": 4, "planning_layers": "upper"}, None),
    ):
        checkpoint = {"state_dict": network.state_dict(), "hyper_parameters": {"network": asdict(network.config) | gone}}
        if message is None:
            check_checkpoint_shapes(checkpoint, network, network.config)
            continue
        with pytest.raises(ValueError, match=f"^the checkpoint is of another version of this code: {re.escape(message)}$"):
            check_checkpoint_shapes(checkpoint, network, network.config)


def test_a_baseline_with_other_heads_is_another_network() -> None:
    saved = BaselineLightningModule(BaselineConfig(vocab_size=16, model_dim=16, num_layers=1, num_heads=2, ffn_dim=16))
    checkpoint = {"state_dict": saved.state_dict(), "hyper_parameters": {"network": asdict(saved.config)}}
    saved.on_load_checkpoint(checkpoint)
    other = BaselineLightningModule(replace(saved.config, num_heads=4))
    with pytest.raises(ValueError, match=r"num_heads is 2 there and 4 here; set model\.network\.num_heads=2"):
        other.on_load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("min_learning_rate_ratio", 1.5),
        ("warmup_steps", -1),
        ("decay_steps", 0),
        ("weight_decay", -0.1),
        ("betas", (0.9, 1.0)),
        ("eps", 0.0),
        ("lambda_P_final", -1.0),
        ("lambda_P_anneal_steps", -1),
    ],
)
def test_hyperparameters_that_cannot_be_meant(name: str, value: Any, stubs: ModuleType) -> None:
    with pytest.raises(ValueError, match=rf"model\.{name} is .*; give "):
        stubs.make_module(**{name: value})
