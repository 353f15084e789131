"""The optimiser's groups: every trainable parameter exactly once, and only matrices decay."""

from types import ModuleType

import pytest
import torch

from lightning_modules.parameter_groups import assert_covers, parameter_groups
from mmrec.model import MMRecModel

NETWORKS = [
    *({"planning_loss": form} for form in ("mse", "normalized")),
    {"use_hem": False, "use_dpg": True},
    {"tie_embeddings": False},
    {"use_uboo": False},
]


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest, stubs: ModuleType) -> MMRecModel:
    return MMRecModel(stubs.tiny_config(**request.param))


def test_every_trainable_parameter_is_in_exactly_one_group(network: MMRecModel) -> None:
    groups = parameter_groups(network, 0.1, network.no_weight_decay_parameters())
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = [id(parameter) for parameter in network.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trainable)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_norms_biases_and_time_constants_do_not_decay(network: MMRecModel) -> None:
    decaying = {id(parameter) for parameter in parameter_groups(network, 0.1, network.no_weight_decay_parameters())[0]["params"]}
    names = {name for name, parameter in network.named_parameters() if id(parameter) in decaying}
    assert any(name.endswith("weight") for name in names)
    assert not {name for name in names if "bias" in name or "norm" in name or "A_log" in name or "dt_bias" in name or "embedding" in name}


def test_the_embedding_decays_by_choice(network: MMRecModel) -> None:
    by_choice = parameter_groups(network, 0.1, network.no_weight_decay_parameters(), decay_embeddings=True)
    assert any(parameter is network.embedding.weight for parameter in by_choice[0]["params"])


def test_a_forgotten_a_doubled_and_a_foreign_parameter_are_named(network: MMRecModel) -> None:
    groups = parameter_groups(network, 0.1, network.no_weight_decay_parameters())
    forgotten = [{"params": group["params"][1:]} for group in groups]
    with pytest.raises(RuntimeError, match=r"parameter \S+ is in 0 optimiser groups instead of 1"):
        assert_covers(network, forgotten)
    with pytest.raises(RuntimeError, match=r"parameter \S+ is in 2 optimiser groups instead of 1"):
        assert_covers(network, [*groups, {"params": groups[0]["params"][:1]}])
    with pytest.raises(RuntimeError, match="1 parameters in the optimiser's groups do not belong"):
        assert_covers(network, [*groups, {"params": [torch.nn.Parameter(torch.zeros(1))]}])


def test_an_unknown_name_is_refused(network: MMRecModel) -> None:
    with pytest.raises(ValueError, match=r"no parameter of the network is named blocks.9.nothing"):
        parameter_groups(network, 0.1, {"blocks.9.nothing"})
