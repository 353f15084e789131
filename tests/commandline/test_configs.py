"""Finding configs, what they inherit, and that every shipped one can be built."""

from pathlib import Path

import pytest
import torch
import yaml

from datamodules.sample import DEFAULT_VOCAB_SIZE
from mmrec.commandline.configs import config_layers, find_config, merge, read_config, shipped_configs
from mmrec.commandline.memory_estimate import estimate
from mmrec.commandline.memory_plan import asked_by, plans
from mmrec.config import MMRecConfig
from mmrec.model import MMRecModel

# Parameters without UBÖO's projections, in millions, and shape: what the names promise.
SHIPPED = {
    "cpu_tiny": (1.0, 2, 128),
    "debug": (1.0, 2, 128),
    "h100_125m": (125, 10, 768),
    "h100_370m": (368, 9, 1536),
    "h100_1b3": (1270, 18, 2048),
    "a100_7b": (6600, 24, 4096),
    "a100_7b_fsdp2": (6600, 24, 4096),
    "h100_7b": (6600, 24, 4096),
    "study_35m": (35.3, 5, 512),
    "study_120m": (125, 10, 768),
}


def test_the_shipped_configs_are_the_promised_ones() -> None:
    assert set(shipped_configs()) == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_parses_and_builds_on_the_meta_device(name: str, cli) -> None:
    millions, layers, width = SHIPPED[name]
    printed = cli("fit", "--config", f"{name}.yaml", "--print_config")
    assert printed.code == 0, printed.err
    parsed = yaml.safe_load(printed.out)
    config = MMRecConfig(**parsed["model"]["network"])
    with torch.device("meta"):
        model = MMRecModel(config)
    assert model.num_parameters(training_only=False) / 1e6 == pytest.approx(millions, rel=0.015)
    assert (config.num_layers, config.model_dim) == (layers, width)
    assert config.head_dim in (64, 128)
    data = parsed["data"]["init_args"]
    assert config.vocab_size == (data["vocab_size"] or (DEFAULT_VOCAB_SIZE if data["source"] == "sample" else None))
    assert parsed["trainer"]["max_steps"] > 0
    assert parsed["trainer"]["gradient_clip_val"] == 1.0
    # What the parser makes of a config's layers is what `configs` reads.
    layered = MMRecConfig(**merge(config_layers(name))["model"]["network"])
    assert layered == config


@pytest.mark.parametrize(("use_uboo", "batch", "parameters"), [(False, 4, 6.60e9), (True, 2, 7.41e9)])
@pytest.mark.parametrize("name", ["a100_7b", "h100_7b"])
def test_the_largest_fit_80_GB_with_and_without_uboo(name: str, use_uboo: bool, batch: int, parameters: float) -> None:
    """Under plain data parallelism, of which nothing comes on top."""
    content = merge(config_layers(name))
    assert content["data"]["init_args"]["batch_size"] == 4
    content["model"]["network"]["use_uboo"], content["data"]["init_args"]["batch_size"] = use_uboo, batch
    row = estimate(name, content)
    assert row.parameters == pytest.approx(parameters, rel=0.005)
    assert row.total < 75e9
    assert asked_by(content, 8).kind == "DDP"
    assert {plan.strategy: plan.total for plan in plans(name, content, 8)}["DDP"] == row.total


def test_no_shipped_config_copies_another() -> None:
    """What a config says again, its bases do not say."""
    for name in shipped_configs():
        *bases, own = config_layers(name)
        inherited = _leaves(merge(bases)) if bases else {}
        repeated = {key for key, value in _leaves(own.content).items() if key in inherited and inherited[key] == value}
        assert not repeated, f"{name} repeats {repeated}"


def _leaves(content: dict, prefix: str = "") -> dict:
    leaves = {}
    for key, value in content.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def test_a_config_as_given_comes_before_a_shipped_one(tmp_path: Path) -> None:
    assert find_config("cpu_tiny") == find_config("cpu_tiny.yaml") == shipped_configs()["cpu_tiny"]
    Path("cpu_tiny.yaml").write_text("seed_everything: 7\n")
    assert read_config(find_config("cpu_tiny.yaml")) == {"seed_everything": 7}
    with pytest.raises(FileNotFoundError, match=r"no config elsewhere/cpu_tiny\.yaml"):
        find_config("elsewhere/cpu_tiny.yaml")


def test_an_unknown_config_lists_those_that_exist(cli) -> None:
    error = cli("fit", "--config", "cpu_tinny").error
    assert error.startswith("no config cpu_tinny; did you mean cpu_tiny?")
    assert all(name in error for name in SHIPPED)


def test_bases_are_merged_first_and_found_beside_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "a.yaml").write_text("trainer: {max_steps: 1, devices: 1}\n")
    (folder / "b.yaml").write_text("trainer: {max_steps: 2}\nmodel: {eps: 1e-5}\n")
    (folder / "c.yaml").write_text("base: [a, b.yaml]\ntrainer: {devices: 3}\n".replace("[a,", "[a.yaml,"))
    assert merge(config_layers(str(folder / "c.yaml"))) == {"trainer": {"max_steps": 2, "devices": 3}, "model": {"eps": "1e-5"}}


@pytest.mark.parametrize(
    ("overlay", "kept"),
    [
        ("{class_path: b.Y, init_args: {new: 2}}", {"class_path": "b.Y", "init_args": {"new": 2}}),
        ("{class_path: b.Y}", {"class_path": "b.Y"}),
        ("{class_path: X, init_args: {new: 2}}", {"class_path": "X", "init_args": {"old": 1, "new": 2}}),  # the same, without its module
        ("{init_args: {new: 2}}", {"class_path": "a.X", "init_args": {"old": 1, "new": 2}}),
        ("auto", "auto"),
    ],
)
def test_another_class_takes_nothing_of_the_one_before(overlay: str, kept: object) -> None:
    Path("a.yaml").write_text("trainer: {strategy: {class_path: a.X, init_args: {old: 1}}}\n")
    Path("b.yaml").write_text(f"base: a.yaml\ntrainer: {{strategy: {overlay}}}\n")
    assert merge(config_layers("b.yaml"))["trainer"]["strategy"] == kept


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("base: x.yaml\n", "base x.yaml leads back to itself"),
        ("base: 3\n", "x.yaml: base must be the name of a config or a list of such names"),
        ("base: nowhere\n", "no config nowhere"),
        ("trainer:\n  max_steps: 3\n  max_steps: 4\n", "x.yaml:3: key trainer.max_steps is given twice"),
        ("trainer: [\n", "x.yaml:2: not valid YAML: "),
        ("- a\n", "x.yaml: expected a mapping of keys to values at the top"),
        ("text\n", "x.yaml: expected a mapping of keys to values at the top"),
        (b"\xff\xfe", "x.yaml is not UTF-8 text: byte 0 is 0xff"),
    ],
)
def test_a_file_that_is_no_config_is_refused_in_one_line(content: str | bytes, message: str, cli) -> None:
    Path("x.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in cli("fit", "--config", "x.yaml").error


def test_several_configs_in_a_row_and_options_after_them(cli) -> None:
    Path("a.yaml").write_text("trainer:\n  max_steps: 7\n  callbacks:\n  - class_path: LearningRateMonitor\n")
    Path("b.yaml").write_text("trainer:\n  callbacks+:\n  - class_path: DeviceStatsMonitor\n")
    Path("c.yaml").write_text("trainer:\n  callbacks:\n  - class_path: ModelSummary\n")

    def parsed(*arguments: str) -> dict:
        return yaml.safe_load(cli("fit", "--config", "cpu_tiny", *arguments, "--print_config").out)["trainer"]

    def names(trainer: dict) -> list[str]:
        return [callback["class_path"].rpartition(".")[2] for callback in trainer["callbacks"]]

    both = parsed("--config", "a.yaml", "--config=b.yaml")
    assert both["max_steps"] == 7
    assert names(both) == ["LearningRateMonitor", "DeviceStatsMonitor"]  # callbacks+ appends
    assert names(parsed("-c", "a.yaml", "-c", "c.yaml")) == ["ModelSummary"]  # callbacks replaces
    assert parsed("--config", "a.yaml", "--trainer.max_steps", "9")["max_steps"] == 9
    assert parsed("--trainer.max_steps", "9", "--config", "a.yaml")["max_steps"] == 7
