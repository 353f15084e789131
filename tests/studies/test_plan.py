"""Which runs a study is made of."""

from pathlib import Path

import pytest
import torch

from mmrec.commandline.errors import BadInputError
from mmrec.config import MMRecConfig
from mmrec.model import MMRecModel
from mmrec.studies.plan import BASELINES, SIZES, Study, overlays, studies


def test_the_protocol_is_the_founding_documents() -> None:
    runs = studies()["protocol"].runs()
    assert len(runs) == 9
    assert {(run.steps, run.batch_tokens, run.learning_rate) for run in runs} == {(10_000, 8_192, 3e-4)}
    assert [run.description()["uboo"] for run in runs[:3]] == ["off", "mse", "normalized"]
    assert {run.description()["lambda_P"] for run in runs} == {None, 0.1}
    assert [run.seed for run in runs] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_its_other_form_is_the_effective_batch_of_128() -> None:
    runs = studies()["protocol_128"].runs()
    assert {(run.study, run.steps, run.batch_tokens, run.learning_rate) for run in runs} == {("protocol", 381, 128 * 2048, 3e-4)}


def test_arms_rates_and_seeds_are_all_combined() -> None:
    study = Study(name="lr_grid", what="", arms=("mm-rec", "transformer++"), learning_rates=(1e-3, 2e-3), seeds=(0, 1), tokens_m=1.0)
    runs = study.runs()
    assert len({(run.model, run.learning_rate, run.seed) for run in runs}) == 8
    assert {run.steps for run in runs} == {61}
    assert [run.is_baseline for run in runs[:4]] == [False, False, True, True]
    assert all(run.description()["uboo"] is None for run in runs if run.is_baseline)


@pytest.mark.parametrize("name", overlays())
def test_every_overlay_changes_the_network_and_builds(name: str) -> None:
    plain, run = (Study(name="ablation", what="", arms=(arm,)).runs()[0] for arm in ("mm-rec", name))
    assert isinstance(run.network, MMRecConfig)
    assert run.content["model"] != plain.content["model"]
    assert run.variant == name
    with torch.device("meta"):
        MMRecModel(run.network)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("arm", BASELINES)
def test_every_baseline_has_a_config_of_every_size(arm: str, size: str) -> None:
    run = Study(name="baseline", what="", arms=(arm,), size=size).runs()[0]
    assert run.model == arm
    assert run.network.vocab_size == 32000
    assert (run.description()["size"], run.description()["trained_on"]) == (size, "books")


def test_overlays_are_joined_and_unknown_ones_refused(tmp_path: Path) -> None:
    run = Study(name="uboo", what="", arms=("uboo_mse+uboo_normalized",)).runs()[0]
    assert run.variant == "uboo_mse+uboo_normalized"
    assert run.network.planning_loss == "normalized"  # type: ignore[union-attr]
    assert Study(name="uboo", what="", arms=("mm-rec+ablation/uboo_mse",)).runs()[0].variant == "uboo_mse"
    (tmp_path / "dpg.yaml").write_text("model: {network: {use_dpg: true}}\n")
    with pytest.raises(BadInputError, match=r"--arms: dpg and \S+dpg\.yaml would both be called dpg; rename one"):
        Study(name="uboo", what="", arms=("dpg", str(tmp_path / "dpg.yaml"))).runs()
    with pytest.raises(BadInputError, match=r"no arm uboo_msi; did you mean uboo_mse\? give a YAML file, or one of mm-rec, "):
        Study(name="uboo", what="", arms=("uboo_msi",)).runs()
    with pytest.raises(BadInputError, match="less than one step of 16,384"):
        Study(name="uboo", what="", arms=("mm-rec",), tokens_m=0.01).runs()
