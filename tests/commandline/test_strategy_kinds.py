"""What a strategy is, known by its name alone: as Lightning's registry and classes have it, and whatever form it is given in."""

from typing import Any

import pytest
from jsonargparse import Namespace
from lightning.pytorch import strategies
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy, StrategyRegistry

from lightning_modules.fsdp2_strategy import FSDP2Strategy
from lightning_modules.strategies import TunedDDPStrategy
from mmrec.commandline.strategy_kinds import ALONE, ASKED_FOR_BY, DDP, FSDP2, asked_strategy

CLASSES = [getattr(strategies, name) for name in strategies.__all__ if name != "StrategyRegistry"] + [TunedDDPStrategy, FSDP2Strategy]


def path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


TRUTH = {DDPStrategy: DDP, TunedDDPStrategy: DDP, FSDP2Strategy: FSDP2, SingleDeviceStrategy: ALONE}  # DeepSpeed's descends from DDP's


@pytest.mark.parametrize("name", [name for name in StrategyRegistry.available_strategies() if not name.startswith("single_")])
def test_a_name_is_what_lightning_builds_for_it(name: str) -> None:
    built = StrategyRegistry[name]
    for given in (name, name.upper()):
        asked = asked_strategy(given)
        assert (asked.kind, asked.name) == (TRUTH.get(built["strategy"], name), name)
        assert asked.holds_all == (built["strategy"] is DDPStrategy)
        assert asked.forks == (built["init_params"].get("start_method") == "fork")


@pytest.mark.parametrize("cls", CLASSES)
def test_a_class_is_known_however_it_is_written(cls: type[Strategy]) -> None:
    spec = {"class_path": path(cls), "init_args": {"start_method": "fork"}}
    for given in (path(cls), spec, Namespace(class_path=path(cls), init_args=Namespace(start_method="fork")), {"class_path": cls.__name__}):
        asked = asked_strategy(given)
        assert (asked.kind, asked.name) == (TRUTH.get(cls, cls.__name__), cls.__name__)
    assert [asked_strategy(given).forks for given in (spec, path(cls))] == [True, False]


@pytest.mark.parametrize(
    ("given", "kind", "forks"),
    [
        (TunedDDPStrategy(), DDP, False),
        (DDPStrategy(start_method="fork"), DDP, True),
        (FSDP2Strategy(), FSDP2, False),
        (SingleDeviceStrategy(), ALONE, False),
        ("single_device", ALONE, False),
        (None, DDP, False),
        ("auto", DDP, False),
    ],
)
def test_a_strategy_that_is_built_and_none(given: Any, kind: str, forks: bool) -> None:
    assert (asked_strategy(given).kind, asked_strategy(given).forks) == (kind, forks)
    assert asked_strategy(given, 1).kind == (ALONE if kind == DDP else kind)


def test_in_a_notebook_lightning_forks_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.ps1", ">>> ", raising=False)
    assert asked_strategy(None).forks
    assert not asked_strategy("ddp").forks


@pytest.mark.parametrize("kind", [DDP, FSDP2])
def test_what_asks_for_a_kind_is_of_that_kind(kind: str) -> None:
    key, _, value = ASKED_FOR_BY[kind].partition(": ")
    assert asked_strategy({"class_path": value} if key.endswith("class_path") else value).kind == kind
