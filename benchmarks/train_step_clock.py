"""The clock of a training step, as a callback: what the device needs, what the host needs, and which kernels take the time."""

import statistics
import time
from typing import Any

import torch
from lightning.pytorch import Callback
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mmrec.measuring.marks import Clock, CudaClock, HostClock
from mmrec.measuring.meters import CudaMemoryMeter, MemoryMeter, ProcessMemoryMeter

HOST_STEPS = 3  # each begun with the device idle, to see how long the host takes to launch it
TOP = 40


class StepClock(Callback):
    """Times optimiser steps from the end of one to the end of the next; nothing waits for the device in those.

    Args:
        device: where the training runs.
        warmup: steps before the clock, at least 1.
        steps: steps under it.
        profiled: whether one step more is profiled, and its kernels printed.

    Attributes:
        total: steps that the Trainer must be given: the last is not measured, since the training module logs in it.
        first_ended: `time.time()` at the end of the first step, the device waited for.
    """

    def __init__(self, device: torch.device, warmup: int, steps: int, profiled: bool = False) -> None:
        self.device, self.warmup, self.steps, self.profiled = device, max(1, warmup), steps, profiled
        self.on_gpu = device.type == "cuda"
        self.clock: Clock = CudaClock() if self.on_gpu else HostClock()
        self.meter: MemoryMeter = CudaMemoryMeter(device) if self.on_gpu else ProcessMemoryMeter()
        self.total = self.warmup + steps + HOST_STEPS + int(profiled) + 1
        self.first_ended = 0.0
        self._marks: list[Any] = []
        self._host: list[float] = []
        self._peak = self._reserved = 0.0
        self._step = 0
        self._begun = 0.0
        self._profiler: Any = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Where the optimiser has stepped: mark, or begin or end what comes next."""
        if trainer.global_step == self._step:
            return
        ended = time.perf_counter()
        self._step = done = trainer.global_step
        if done == 1:
            self._wait()
            self.first_ended = time.time()
            self.meter.reset_peak()  # the first step's holds what compiling and tuning took
        last_timed = self.warmup + self.steps
        if self.warmup <= done <= last_timed:
            self._marks.append(self.clock.mark())
        if last_timed < done <= last_timed + HOST_STEPS:
            self._host.append((ended - self._begun) * 1e3)
        if last_timed <= done < last_timed + HOST_STEPS:
            self._wait()
            self._begun = time.perf_counter()
        if done == last_timed + HOST_STEPS:
            readings = self.meter.read()
            self._peak, self._reserved = readings["peak"], readings.get("reserved", 0.0)
            if self.profiled:
                self._start_profile()
        elif self._profiler is not None:
            self._end_profile()

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def _start_profile(self) -> None:
        self._wait()
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if self.on_gpu else [ProfilerActivity.CPU]
        self._profiler = profile(activities=activities)
        self._profiler.__enter__()
        self._begun = time.perf_counter()

    def _end_profile(self) -> None:
        self._wait()
        milliseconds = (time.perf_counter() - self._begun) * 1e3
        self._profiler.__exit__(None, None, None)
        print(kernel_table(self._profiler, self.on_gpu, milliseconds), flush=True)
        self._profiler = None

    def results(self) -> dict[str, float | None]:
        """Medians: `ms_per_step`, `host_ms` to launch one; `peak_gib` and `reserved_gib`, of a process's memory on a CPU."""
        self._wait()
        gaps = [self.clock.elapsed_ms(start, end) for start, end in zip(self._marks, self._marks[1:], strict=False)]
        return {
            "ms_per_step": statistics.median(gaps),
            "ms_fastest": min(gaps),
            "ms_slowest": max(gaps),
            "host_ms": statistics.median(self._host) if self.on_gpu else None,
            "peak_gib": self._peak / 2**30,
            "reserved_gib": self._reserved / 2**30 if self.on_gpu else None,
        }


def kernel_table(profiled: Any, on_gpu: bool, step_ms: float) -> str:
    """The most expensive kernels of a step, operators on a CPU: milliseconds, share, how often, name.

    Args:
        profiled: a `torch.profiler.profile` that has ended.
        on_gpu: whether kernels or operators are counted.
        step_ms: the step by the wall clock, the profiler's own cost included.
    """
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    found: dict[str, tuple[float, int]] = {}
    for event in profiled.events():
        if event.device_type != wanted or event.is_user_annotation:
            continue
        # A kernel's event lasts as long as the kernel; an operator's spans those it calls.
        spent = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        before = found.get(event.name, (0.0, 0))
        found[event.name] = (before[0] + spent / 1e3, before[1] + 1)
    total, count = sum(ms for ms, _ in found.values()), sum(number for _, number in found.values())
    what = "kernels and copies" if on_gpu else "operators"
    lines = [f"one step, profiled: {step_ms:.2f} ms by the wall clock; {what}: {count} taking {total:.2f} ms"]
    lines += ["      ms   share   count  name"]
    for name, (ms, number) in sorted(found.items(), key=lambda item: -item[1][0])[:TOP]:
        lines.append(f"{ms:8.3f}  {ms / max(total, 1e-9):5.1%}  {number:6d}  {name[:150]}")
    return "\n".join(lines)
