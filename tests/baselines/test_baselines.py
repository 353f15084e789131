"""Baselines answer to the calls that train MM-Rec, and are as large as they say."""

import pytest
import torch

from lightning_modules import BaselineLightningModule
from lightning_modules.parameter_groups import parameter_groups
from mmrec.baselines import BaselineConfig, BaselineModel
from mmrec.commandline.configs import config_layers, merge
from mmrec.config import MMRecConfig
from mmrec.model import MMRecModel

TINY = BaselineConfig(vocab_size=50, model_dim=32, num_layers=2, num_heads=2, ffn_dim=48)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:].clone()}


def test_the_loss_is_the_logits_cross_entropy_and_reaches_every_parameter(batch: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(0)
    network = BaselineModel(TINY)
    output = network.loss(batch)
    expected = torch.nn.functional.cross_entropy(network(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())
    torch.testing.assert_close(output.loss, expected)
    assert output.auxiliary == 0
    assert output.num_tokens == batch["labels"].numel()
    output.loss.backward()
    assert not [name for name, parameter in network.named_parameters() if parameter.grad is None or not parameter.grad.any()]


def test_no_token_reaches_an_earlier_output(batch: dict[str, torch.Tensor]) -> None:
    network = BaselineModel(TINY)
    ids = batch["input_ids"]
    changed = ids.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 50
    difference = (network(ids) - network(changed)).abs().amax((0, 2))
    assert difference[:9].max() == 0
    assert difference[9:].min() > 0


def test_positions_are_told_apart() -> None:
    """Without its rotary embedding a layer would give the last of `a b c` and of `b a c` the same output."""
    network = BaselineModel(TINY)
    a, b = (network(torch.tensor([ids]))[0, -1] for ids in ([3, 4, 5], [4, 3, 5]))
    assert (a - b).abs().max() > 1e-4


def test_weights_start_as_mm_recs_do() -> None:
    network = BaselineModel(BaselineConfig(vocab_size=500, model_dim=256, num_layers=2, num_heads=2, ffn_dim=512))
    layer = network.blocks[0].layer
    assert float(layer.self_attn.q_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(layer.mlp.down_proj.weight.detach().std()) == pytest.approx(0.02 / 2, rel=0.05)
    assert float(layer.input_layernorm.weight.detach().std()) == 0


def test_its_groups_cover_every_parameter_and_norms_do_not_decay() -> None:
    network = BaselineModel(TINY)
    groups = parameter_groups(network, 0.1, network.no_weight_decay_parameters())
    decayed = {id(parameter) for parameter in groups[0]["params"]}
    assert {name for name, p in network.named_parameters() if id(p) in decayed} == {
        name for name, p in network.named_parameters() if p.ndim == 2 and not name.startswith(("embedding", "head"))
    }


def test_documents_are_refused_and_bad_sizes_named(batch: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"set data\.init_args\.reset_at_documents=false"):
        BaselineModel(TINY).loss(batch | {"reset": torch.zeros(2, 16, dtype=torch.bool)})
    with pytest.raises(ValueError, match="num_heads = 3 does not divide model_dim = 32"):
        BaselineConfig(model_dim=32, num_heads=3)
    with pytest.raises(ValueError, match=r"kind is 'gpt'; choose one of transformer\+\+"):
        BaselineConfig(kind="gpt")  # type: ignore[arg-type]


def test_a_checkpoints_plain_fields_make_the_module_again() -> None:
    module = BaselineLightningModule(TINY, learning_rate=1e-3)
    again = BaselineLightningModule(**{**module.hparams, "network": dict(module.hparams["network"])})
    assert again.config == TINY
    assert again.network.num_parameters() == module.network.num_parameters()


def of_study(size: str, kind: str) -> tuple[int, BaselineConfig]:
    """The weights of the network that a baseline's configuration is made to match, UBÖO's not counted, and that configuration."""
    ours = MMRecConfig(**merge(config_layers(f"study_{size}"))["model"]["network"])
    with torch.device("meta"):
        wanted = MMRecModel(ours).num_parameters(training_only=False)
    return wanted, BaselineConfig(**merge(config_layers(f"baselines/{kind}_{size}"))["baseline"])


@pytest.mark.parametrize("size", ["35m", "120m"])
def test_baselines_are_as_large_as_the_network(size: str) -> None:
    """Within two percent."""
    wanted, theirs = of_study(size, "transformer")
    with torch.device("meta"):
        found = BaselineModel(theirs).num_parameters()
    assert found == pytest.approx(wanted, rel=0.02)


def gated_deltanet_weights(config: BaselineConfig) -> int:
    """Counted from its paper (arXiv:2412.06464), since the library that builds it needs a GPU."""
    dim, heads = config.model_dim, config.num_heads
    key = 3 * dim // (4 * heads)  # a head's; its value is twice as wide
    wide = heads * (key + key + 2 * key)
    projections = dim * (wide + 2 * heads + 2 * 2 * heads * key)  # queries, keys, values; α and β; gate and output
    others = 4 * wide + 2 * heads + 2 * key  # convolutions of four tokens, A_log and dt_bias, the norm of a head's output
    layer = projections + others + 3 * dim * config.ffn_dim + 2 * dim
    return config.vocab_size * dim + config.num_layers * layer + dim


@pytest.mark.parametrize("size", ["35m", "120m"])
def test_gated_deltanets_are_as_large_as_the_network(size: str) -> None:
    wanted, theirs = of_study(size, "gated-deltanet")
    assert theirs.kind == "gated-deltanet"
    assert gated_deltanet_weights(theirs) == pytest.approx(wanted, rel=0.02)
