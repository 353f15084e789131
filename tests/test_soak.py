"""A thousand steps leave the host's memory and the time of a step where they were after two hundred."""

import gc
import statistics
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch.multiprocessing as mp
from lightning.pytorch import Callback

from callbacks import (
    AuxiliaryLossCurves,
    GPUMemoryProfile,
    LossSpikes,
    RandomStates,
    RankAgreement,
    RankChange,
    RankWatch,
    RunCheckpoint,
    SkippedSteps,
    StepLatency,
)
from datamodules import C4DataModule
from datamodules.sample import ensure_sample

STEPS, SETTLED = 1000, 200


class Meter(Callback):
    """Resident memory of the process and the time, after each step."""

    def __init__(self) -> None:
        self.resident: list[int] = []
        self.times: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == SETTLED:
            gc.collect()  # what the start has left in cycles would go at some later step
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident.append(pages)
        self.times.append(time.perf_counter())


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_thousand_steps(num_workers: int, tmp_path: Path, stubs: ModuleType) -> None:
    """With every callback of a run, checkpoints and validation. The time is printed and judged by nobody: others use the machine too."""
    # In a process of its own: training a tokenizer leaves 50 MiB that go back to the system at some later step.
    making = mp.get_context("spawn").Process(target=ensure_sample, args=(str(tmp_path), 300))
    making.start()
    making.join()
    meter = Meter()
    callbacks = [
        GPUMemoryProfile(), AuxiliaryLossCurves(50, 50), SkippedSteps(), LossSpikes(), RankWatch(), StepLatency(), RandomStates(),
        RankChange(), RankAgreement(), meter, RunCheckpoint(every_n_steps=100),
    ]  # fmt: skip
    data = C4DataModule(
        "sample", vocab_size=300, seq_len=64, batch_size=4, num_workers=num_workers, validation_batches=2, cache_dir=str(tmp_path)
    )
    trainer = stubs.make_trainer(tmp_path, callbacks, max_steps=STEPS, val_check_interval=100, log_every_n_steps=10)
    trainer.fit(stubs.make_module({"vocab_size": 300}, learning_rate=1e-3), datamodule=data)
    stretches = [statistics.median(meter.resident[first : first + 100]) for first in range(SETTLED, STEPS, 100)]
    print("resident MiB by hundred steps:", [round(pages * 4096 / 2**20, 1) for pages in stretches])
    times = [after - before for before, after in zip(meter.times, meter.times[1:], strict=False)]
    medians = [statistics.median(times[first : first + 100]) * 1e3 for first in range(SETTLED, STEPS - 1, 100)]
    print("ms a step by hundred steps:", [round(median, 2) for median in medians])
    assert max(stretches) <= 1.02 * stretches[0]
    assert min(stretches) >= 0.98 * stretches[0]
