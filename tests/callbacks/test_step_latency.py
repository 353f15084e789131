"""Percentiles, rates and MFU by hand-made times; phases by a clock that ticks where the hooks are."""

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import RunCheckpoint, StepLatency
from callbacks.step_latency import PHASES, StepTimes
from callbacks.timing import FetchTimer, percentile
from mmrec.measuring.marks import HostClock


@pytest.mark.parametrize("count", [1, 2, 7, 100])
@pytest.mark.parametrize("q", [0, 50, 95, 99, 100])
def test_percentiles_are_numpys(count: int, q: float) -> None:
    values = torch.rand(count, dtype=torch.float64).tolist()
    assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)))


def made_up(step_ms: float, tokens: int = 1000) -> StepTimes:
    return StepTimes({"data": 1.0, "forward": 2.0, "backward": 4.0, "optimizer": 1.0, "step": step_ms}, tokens, sequence_length=10)


def test_rates_and_mfu() -> None:
    latency = StepLatency(window=4, peak_tflops=100.0)
    for step_ms in (1e6, 100.0, 100.0, 100.0, 200.0):  # the first falls out of the window
        latency.times.append(made_up(step_ms))
    module = SimpleNamespace(flops_per_token=lambda seq_len: seq_len * 10**8)
    summary = latency.summary(module, world_size=2)
    assert summary["latency/step_p50_ms"] == 100.0
    assert summary["latency/step_p95_ms"] == pytest.approx(185.0)
    assert summary["latency/step_p99_ms"] == pytest.approx(197.0)
    assert summary["latency/backward_p50_ms"] == 4.0
    assert summary["throughput/tokens_per_second_per_device"] == pytest.approx(4000 / 0.5)
    assert summary["throughput/tokens_per_second"] == pytest.approx(2 * 4000 / 0.5)
    assert summary["throughput/steps_per_second"] == pytest.approx(4 / 0.5)
    assert summary["throughput/model_tflops_per_second_per_device"] == pytest.approx(8000 * 1e9 / 1e12)
    assert summary["throughput/mfu"] == pytest.approx(8 / 100)


def test_without_a_known_peak_there_is_no_mfu() -> None:
    latency = StepLatency()
    latency.times.append(made_up(100.0))
    assert "throughput/mfu" not in latency.summary(SimpleNamespace(flops_per_token=lambda seq_len: 1), world_size=1)


class CountingClock(HostClock):
    """Every mark is one second after the one before, and is ready only `delay` marks later."""

    def __init__(self, delay: int = 0) -> None:
        self.now, self.delay = 0.0, delay

    def mark(self) -> float:
        self.now += 1.0
        return self.now

    def is_ready(self, mark: float) -> bool:
        return self.now - mark >= self.delay


class CountedLatency(StepLatency):
    """With the clock above, on whatever device."""

    def __init__(self, delay: int = 0) -> None:
        super().__init__()
        self.counting = CountingClock(delay)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self.clock = self.counting


@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_phase_of_every_micro_batch_is_in_the_step(accumulate: int, tmp_path: Path, stubs: ModuleType) -> None:
    latency = CountedLatency()
    trainer = stubs.make_trainer(
        tmp_path, [latency], max_steps=4, accumulate_grad_batches=accumulate, logger=False, limit_val_batches=0, val_check_interval=100
    )
    trainer.fit(stubs.make_module(), datamodule=stubs.StubData())
    assert len(latency.times) == 3  # the first step is not counted
    for times in latency.times:
        seconds = {phase: times.milliseconds[phase] / 1e3 for phase in PHASES}
        assert seconds["forward"] == seconds["backward"] == accumulate
        assert seconds["optimizer"] == 1
        assert seconds["step"] == 3 * accumulate + 2  # three marks a micro-batch and two around the optimiser
        assert 0 < seconds["data"] < 1
        assert times.tokens == accumulate * 4 * stubs.SEQ_LEN
        assert times.sequence_length == stubs.SEQ_LEN


def test_marks_are_read_when_the_device_has_passed_them(tmp_path: Path, stubs: ModuleType) -> None:
    latency = CountedLatency(delay=7)
    trainer = stubs.make_trainer(tmp_path, [latency], max_steps=6, logger=False, limit_val_batches=0, val_check_interval=100)
    trainer.fit(stubs.make_module(), datamodule=stubs.StubData())
    assert len(latency.times) == 3  # of the five counted, the last two steps of five marks each are still under way
    assert all(times.milliseconds["step"] == 5e3 for times in latency.times)


def test_validation_and_checkpoints_are_no_part_of_a_step(tmp_path: Path, stubs: ModuleType) -> None:
    latency = CountedLatency()

    class Slow(RunCheckpoint):
        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            latency.counting.now += 1000

    trainer = stubs.make_trainer(tmp_path, [latency, Slow(every_n_steps=2)], max_steps=6, logger=False, limit_val_batches=0)
    trainer.fit(stubs.make_module(), datamodule=stubs.StubData())
    assert all(times.milliseconds["step"] < 10e3 for times in latency.times)


def test_the_tags(tmp_path: Path, stubs: ModuleType) -> None:
    trainer = stubs.make_trainer(tmp_path, [StepLatency(peak_tflops=0.001)], max_steps=5, log_every_n_steps=2)
    trainer.fit(stubs.make_module(), datamodule=stubs.StubData())
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    tags = {tag for tag in events.Tags()["scalars"] if tag.startswith(("latency/", "throughput/"))}
    latencies = {f"latency/{phase}_p{q}_ms" for phase in PHASES for q in (50, 95, 99)}
    rates = {"tokens_per_second", "tokens_per_second_per_device", "steps_per_second", "model_tflops_per_second_per_device", "mfu"}
    assert tags == latencies | {f"throughput/{rate}" for rate in rates}
    assert [event.step for event in events.Scalars("latency/step_p50_ms")] == [2, 4]
    assert "start" not in vars(trainer.profiler)  # the profiler is as it was


def test_flops_are_counted_once_a_sequence_length() -> None:
    asked: list[int] = []
    module = SimpleNamespace(flops_per_token=lambda length: asked.append(length) or 10 * length)
    latency = StepLatency()
    latency.times.extend(StepTimes(dict.fromkeys(PHASES, 500.0), tokens, length) for tokens, length in [(100, 8), (100, 8), (50, 4)])
    values = latency.summary(module, world_size=2)
    assert values["throughput/model_tflops_per_second_per_device"] == (2 * 100 * 80 + 50 * 40) / 1.5 / 1e12
    assert sorted(asked) == [4, 8]


def test_only_the_fetch_of_training_batches_counts() -> None:
    calls: list[str] = []
    profiler = SimpleNamespace(start=lambda name: calls.append("+" + name), stop=lambda name: calls.append("-" + name))
    timer = FetchTimer()
    timer.install(profiler)
    for name in ("run_training_batch", FetchTimer.ACTION):
        profiler.start(name)
        profiler.stop(name)
    assert calls == ["+run_training_batch", "-run_training_batch", "+" + FetchTimer.ACTION, "-" + FetchTimer.ACTION]
    assert timer.take_ms() > 0
    assert timer.take_ms() == 0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="window is 0; give at least 1 step"):
        StepLatency(window=0)
    with pytest.raises(ValueError, match=r"peak_tflops is -1\.0; give a number above 0"):
        StepLatency(peak_tflops=-1.0)
