"""The curves of the auxiliary loss: their tags, their values, their layout, and that they disturb nothing."""

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from callbacks import AuxiliaryLossCurves, GPUMemoryProfile, LossSpikes, SkippedSteps, StepLatency
from callbacks.tensorboard_layout import custom_scalar_layout


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    return events


def curves(events: EventAccumulator) -> dict[str, dict[int, float]]:
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tags_values_and_histograms(tmp_path: Path, stubs: ModuleType) -> None:
    module = stubs.make_module({"planning_loss": "normalized", "lambda_P": 0.05})
    auxiliary = AuxiliaryLossCurves(diagnostics_every_n_steps=3, gradients_every_n_steps=2)
    trainer = stubs.make_trainer(tmp_path, [auxiliary], max_steps=5, accumulate_grad_batches=2)
    trainer.fit(module, datamodule=stubs.StubData())
    events = read(tmp_path)
    logged = curves(events)
    diagnostics = ("target_variance", "target_effective_rank", "gate_jacobian_max", "gate_jacobian_share")
    by_layer = {f"aux/layer_{index:02d}/{name}" for index in (0, 1) for name in (*diagnostics, "loss")}
    assert {tag for tag in logged if tag.startswith("aux/")} == by_layer | {"aux/share_of_total", "aux/grad_norm_ratio", "aux/grad_cosine"}
    assert list(logged["aux/layer_01/loss"]) == [0, 1, 2, 3, 4]
    assert list(logged["aux/layer_01/target_variance"]) == [0, 3, 4]  # the last as well
    assert list(logged["aux/grad_norm_ratio"]) == [0, 2, 4]
    for step in range(5):
        total = sum(logged[f"aux/layer_{index:02d}/loss"][step] for index in (0, 1))
        assert 0.05 * total == pytest.approx(logged["train/loss_aux"][step], rel=1e-5)
        assert logged["aux/share_of_total"][step] == pytest.approx(logged["train/loss_aux"][step] / logged["train/loss"][step], rel=1e-5)
    assert logged["aux/layer_00/target_variance"][0] > 0
    assert 1 < logged["aux/layer_00/target_effective_rank"][0] <= 16
    assert set(events.Tags()["histograms"]) == {f"aux/by_layer/{name}" for name in (*diagnostics, "loss")}


def test_training_does_not_notice(tmp_path: Path, stubs: ModuleType) -> None:
    def losses(folder: Path, *callbacks: Callback) -> Any:
        trainer = stubs.make_trainer(folder, list(callbacks), max_steps=4)
        trainer.fit(stubs.make_module({"planning_loss": "normalized"}), datamodule=stubs.StubData())
        logged = curves(read(folder))
        return logged["train/loss"], logged["train/grad_norm"], logged["val/loss"]

    watched = losses(tmp_path / "b", AuxiliaryLossCurves(1, 1), GPUMemoryProfile(snapshot_steps=[1]), StepLatency())
    assert losses(tmp_path / "a") == watched


def test_without_uboo_only_the_gates_are_left(tmp_path: Path, stubs: ModuleType) -> None:
    trainer = stubs.make_trainer(tmp_path, [AuxiliaryLossCurves(1, 1)], max_steps=2)
    trainer.fit(stubs.make_module({"use_uboo": False}), datamodule=stubs.StubData())
    names = {tag.split("/")[-1] for tag in curves(read(tmp_path)) if tag.startswith("aux/")}
    assert names == {"gate_jacobian_max", "gate_jacobian_share"}


def test_nothing_is_measured_where_nothing_is_asked(tmp_path: Path, stubs: ModuleType) -> None:
    trainer = stubs.make_trainer(tmp_path, [AuxiliaryLossCurves(0, 0)], max_steps=2)
    trainer.fit(stubs.make_module(), datamodule=stubs.StubData())
    tags = {tag for tag in curves(read(tmp_path)) if tag.startswith("aux/")}
    assert tags == {"aux/layer_00/loss", "aux/layer_01/loss", "aux/share_of_total"}


def test_every_chart_of_the_layout_finds_its_tags(tmp_path: Path, stubs: ModuleType) -> None:
    """And every tag that a run writes is in a chart."""
    callbacks = [AuxiliaryLossCurves(1, 1), GPUMemoryProfile(), SkippedSteps(), LossSpikes(), StepLatency(peak_tflops=1.0)]
    stubs.make_trainer(tmp_path, callbacks, max_steps=3).fit(stubs.make_module(), datamodule=stubs.StubData(validation_sources=2))
    events = read(tmp_path)
    tags = events.Tags()["scalars"]
    charts = {title: chart[1] for charts in custom_scalar_layout().values() for title, chart in charts.items()}
    for title, expressions in charts.items():
        assert any(re.match(expression, tag) for expression in expressions for tag in tags), title
    # The median and the 99th percentile of a phase are enough, as is its peak memory.
    spared = re.compile(r"latency/\w+_p95_ms|latency/\w+_p99_ms|memory/\w+_rss|throughput/steps_per_second")
    expressions = [expression for chart in charts.values() for expression in chart]
    assert [tag for tag in tags if not spared.fullmatch(tag) and not any(re.match(e, tag) for e in expressions)] == []
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(custom_scalar_layout())


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="diagnostics_every_n_steps is -1; give a number of steps, or 0 for never"):
        AuxiliaryLossCurves(diagnostics_every_n_steps=-1)
    with pytest.raises(ValueError, match="gradient_sequences is 0; give at least 1"):
        AuxiliaryLossCurves(gradient_sequences=0)
