"""StepLatency: where a step's time goes, tokens a second, and MFU."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from callbacks.device_peaks import dense_bf16_peak
from callbacks.scalars import is_log_step, log_scalars
from callbacks.timing import FetchTimer, percentile
from mmrec.measuring.marks import Clock, CudaClock, HostClock

PHASES = ("data", "forward", "backward", "optimizer", "step")
PERCENTILES = (50, 95, 99)


@dataclass
class StepTrace:
    """Marks of one optimiser step; `spans` has one entry a phase and micro-batch."""

    begin: Any
    previous_end: Any  # None where something else (validation, a checkpoint) lay between
    spans: list[tuple[str, Any, Any]] = field(default_factory=list)
    data_ms: float = 0.0
    tokens: int = 0
    sequence_length: int = 1
    end: Any = None


@dataclass(frozen=True)
class StepTimes:
    """What a trace came to: milliseconds by phase, and this rank's tokens."""

    milliseconds: dict[str, float]
    tokens: int
    sequence_length: int


class StepLatency(Callback):
    """Times data wait, forward, backward, optimiser and whole step, without making the host wait for the device.

    On a GPU the marks are events that are read a few steps later, once they have passed; on a CPU the host's clock is enough. A step is
    an *optimiser* step: with gradient accumulation the phases of its micro-batches add up. The whole step runs from the end of the one
    before to its own end, so that logging and callbacks count; where a validation or a checkpoint lay between, they are left out. The
    first step is not counted.

    Logged every `trainer.log_every_n_steps`, over the latest `window` steps: `latency/<phase>_p50_ms`, `…_p95_ms`, `…_p99_ms` for data,
    forward, backward, optimizer and step; `throughput/tokens_per_second` (all ranks), `throughput/tokens_per_second_per_device`,
    `throughput/steps_per_second`, `throughput/model_tflops_per_second_per_device` and, where the device's peak is known,
    `throughput/mfu`: model FLOP/s by `pl_module.flops_per_token` over the dense bf16 peak, whatever the precision.

    Put it behind other callbacks that work in `on_train_batch_start`: the forward begins when this one is called.
    """

    def __init__(self, window: int = 100, peak_tflops: float | None = None) -> None:
        """Keep the latest `window` steps.

        Args:
            window: optimiser steps the percentiles and rates are taken over.
            peak_tflops: dense peak of one device in TFLOP/s, for MFU. None: looked up by the device's name.
        """
        if window < 1:
            raise ValueError(f"StepLatency: window is {window}; give at least 1 step")
        if peak_tflops is not None and peak_tflops <= 0:
            raise ValueError(f"StepLatency: peak_tflops is {peak_tflops}; give a number above 0, or null to look it up")
        self.times: deque[StepTimes] = deque(maxlen=window)
        self.clock: Clock = HostClock()
        self.peak_flops = peak_tflops * 1e12 if peak_tflops is not None else None
        self._fetches = FetchTimer()
        self._pending: deque[StepTrace] = deque()
        self._trace: StepTrace | None = None
        self._previous_end: Any = None
        self._open: Any = None
        self._after_step: list[RemovableHandle] = []
        self._global_step = 0
        self._skip_first = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the clock and the peak by the device."""
        if pl_module.device.type == "cuda":
            self.clock = CudaClock()
            if self.peak_flops is None:
                self.peak_flops = dense_bf16_peak(torch.cuda.get_device_name(pl_module.device))
        self._fetches.install(trainer.profiler)
        # No callback hook stands right behind the optimiser: before on_train_batch_end come the other callbacks' own.
        self._after_step = [optimizer.register_step_post_hook(self._optimizer_stepped) for optimizer in trainer.optimizers]
        self._global_step = trainer.global_step
        self._skip_first, self._previous_end = True, None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The forward of a micro-batch begins."""
        self._open = self.clock.mark()
        if self._trace is None:
            self._trace = StepTrace(begin=self._open, previous_end=self._previous_end)
        self._trace.data_ms += self._fetches.take_ms()
        self._trace.tokens += batch["input_ids"].numel()
        self._trace.sequence_length = batch["input_ids"].shape[-1]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The forward ends, the backward begins."""
        self._close("forward")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The backward ends."""
        self._close("backward")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Clipping and the optimiser begin."""
        self._open = self.clock.mark()

    def _optimizer_stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._close("optimizer")

    def _close(self, phase: str) -> None:
        if self._trace is not None:
            mark = self.clock.mark()
            self._trace.spans.append((phase, self._open, mark))
            self._open = mark

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Where the optimiser has stepped, close the step's trace; read those that are done; log."""
        if trainer.global_step == self._global_step or self._trace is None:
            return
        step, self._global_step = self._global_step, trainer.global_step
        trace, self._trace = self._trace, None
        self._previous_end = trace.end = self._open
        if self._skip_first:  # it holds compilation, allocation and the start of the loader's workers
            self._skip_first = False
            return
        self._pending.append(trace)
        self._read_finished()
        if is_log_step(trainer, step) and self.times:
            log_scalars(trainer, self.summary(pl_module, trainer.world_size), step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What lies before the next step is not a step's time."""
        self._interrupt()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """What lies before the next step is not a step's time."""
        self._interrupt()

    def _interrupt(self) -> None:
        self._previous_end = None
        if self._trace is not None:  # between two micro-batches
            self._trace.previous_end = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop listening to the profiler and the optimiser."""
        self._fetches.remove()
        for handle in self._after_step:
            handle.remove()
        self._after_step = []

    def _read_finished(self) -> None:
        while self._pending and self.clock.is_ready(self._pending[0].end):
            self.times.append(self._read(self._pending.popleft()))

    def _read(self, trace: StepTrace) -> StepTimes:
        milliseconds = dict.fromkeys(PHASES, 0.0)
        for phase, start, end in trace.spans:
            milliseconds[phase] += self.clock.elapsed_ms(start, end)
        milliseconds["data"] = trace.data_ms
        if trace.previous_end is not None:
            milliseconds["step"] = self.clock.elapsed_ms(trace.previous_end, trace.end)
        else:
            milliseconds["step"] = sum(milliseconds[phase] for phase in PHASES[:-1])
        return StepTimes(milliseconds, trace.tokens, trace.sequence_length)

    def summary(self, pl_module: Any, world_size: int) -> dict[str, float]:
        """Percentiles and rates over the window, by tag.

        Args:
            pl_module: has `flops_per_token(seq_len)`.
            world_size: devices that read as many tokens as this one.
        """
        values = {
            f"latency/{phase}_p{q}_ms": percentile([times.milliseconds[phase] for times in self.times], q)
            for phase in PHASES
            for q in PERCENTILES
        }
        seconds = sum(times.milliseconds["step"] for times in self.times) / 1e3
        per_device = sum(times.tokens for times in self.times) / seconds
        flops_per_token = {length: pl_module.flops_per_token(length) for length in {times.sequence_length for times in self.times}}
        flops = sum(times.tokens * flops_per_token[times.sequence_length] for times in self.times) / seconds
        values |= {
            "throughput/tokens_per_second": per_device * world_size,
            "throughput/tokens_per_second_per_device": per_device,
            "throughput/steps_per_second": len(self.times) / seconds,
            "throughput/model_tflops_per_second_per_device": flops / 1e12,
        }
        if self.peak_flops is not None:
            values["throughput/mfu"] = flops / self.peak_flops
        return values
