"""GPUMemoryProfile: memory a step and by phase, a table by category, snapshots on demand and when memory runs out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from callbacks.memory_readings import SavedActivations, category_bytes, markdown_table
from callbacks.memory_snapshot import is_out_of_memory, start_history, stop_history, write_snapshot
from callbacks.scalars import is_log_step, log_scalars, summary_writers
from mmrec.measuring.meters import MIB, CudaMemoryMeter, MemoryMeter, ProcessMemoryMeter

REQUEST_FILE = "request"


class GPUMemoryProfile(Callback):
    """Memory of rank 0's device at every logged step, in MiB; of the process where training runs on a CPU.

    Tags: `memory/allocated`, `memory/reserved`, `memory/peak` at the end of the step and over it, and
    `memory/<phase>_allocated|_reserved|_peak` for forward, backward and optimizer (at the end of the phase, and its peak; with gradient
    accumulation the largest of the micro-batches). On a CPU `rss` stands for `allocated` and `reserved`. Nothing waits for the device.

    The table (parameters, buffers, gradients, optimiser state, activations) is printed once, in the second step of the process, when the
    optimiser has a state, and goes to TensorBoard as the text `memory/table`. Activations: on a GPU what is allocated at the end of the
    forward beyond the rest, on a CPU the tensors that autograd saved.

    Snapshots go to `<snapshot_dir>/step=NNNNNN-rank=R` at the steps given, at the step after `<snapshot_dir>/request` was touched, and
    as `out-of-memory-…` when an allocation failed. A GPU's are for PyTorch's memory viewer and hold the history of that step; with
    `record_history` that of the steps before as well, which the one at out-of-memory needs to be of much use.
    """

    def __init__(self, snapshot_steps: Sequence[int] = (), snapshot_dir: str | None = None, record_history: bool = False) -> None:
        """Profile.

        Args:
            snapshot_steps: steps (optimiser steps taken before, so 0 is the first) to take a snapshot of.
            snapshot_dir: where to. None: `memory` under trainer.default_root_dir.
            record_history: record allocations all the time (costs host time at each).
        """
        if any(step < 0 for step in snapshot_steps):
            raise ValueError(f"GPUMemoryProfile: snapshot_steps are {list(snapshot_steps)}; give steps from 0")
        self.snapshot_steps = frozenset(snapshot_steps)
        self.snapshot_dir = snapshot_dir
        self.record_history = record_history
        self.meter: MemoryMeter = ProcessMemoryMeter()
        self.table: dict[str, int] = {}
        self.snapshots: list[Path] = []
        self._on_gpu = False
        self._readings: dict[str, float] = {}  # bytes by tag of the step under way; empty where it is not logged
        self._step_peak = 0.0
        self._global_step = self._first_step = 0
        self._in_step = self._measured = self._snapshot_due = False
        self._activations: SavedActivations | None = None
        self._request_seen = 0

    def _folder(self, trainer: Trainer) -> Path:
        return Path(self.snapshot_dir) if self.snapshot_dir is not None else Path(trainer.default_root_dir) / "memory"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose what to read by the device."""
        self._on_gpu = pl_module.device.type == "cuda"
        self.meter = CudaMemoryMeter(pl_module.device) if self._on_gpu else ProcessMemoryMeter()
        self._global_step = self._first_step = trainer.global_step
        self._in_step = False
        self._request_seen = self._request_time(trainer)
        if self.record_history:
            start_history()

    def _request_time(self, trainer: Trainer) -> int:
        request = self._folder(trainer) / REQUEST_FILE
        return request.stat().st_mtime_ns if request.exists() else 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A forward begins."""
        step = trainer.global_step
        if not self._in_step:
            self._in_step, self._readings, self._step_peak = True, {}, 0.0
            self._measured = is_log_step(trainer, step)
            requested = self._request_time(trainer)
            self._snapshot_due = step in self.snapshot_steps or requested != self._request_seen
            self._request_seen = requested
            if self._snapshot_due and not self.record_history:
                start_history()
        if step == self._first_step + 1 and not self.table:
            self._activations = SavedActivations(pl_module)
            if not self._on_gpu:
                self._activations.start()
        if self._measured:
            self.meter.reset_peak()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The forward ends, the backward begins."""
        self._end_phase("forward")
        if self._activations is not None:
            saved = self._activations.stop()
            categories = category_bytes(pl_module, trainer.optimizers)
            if self._on_gpu:
                saved = max(0, int(self.meter.read()["allocated"]) - sum(categories.values()))
            self.table = categories | {"activations": saved}
            self._activations = None

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The backward ends."""
        self._end_phase("backward")
        if self.table and trainer.global_step == self._first_step + 1:
            self.table["gradients"] = category_bytes(pl_module, trainer.optimizers)["gradients"]  # they were freed before the forward

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Clipping and the optimiser begin."""
        if self._measured:
            self.meter.reset_peak()

    def _end_phase(self, phase: str) -> None:
        if not self._measured:
            return
        readings = self.meter.read()
        self._step_peak = max(self._step_peak, readings["peak"])
        for name, value in readings.items():
            tag = f"memory/{phase}_{name}"
            self._readings[tag] = max(value, self._readings.get(tag, 0.0))
        self.meter.reset_peak()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Where the optimiser has stepped: log, show the table once, take the snapshot that is due."""
        if trainer.global_step == self._global_step:
            return
        step, self._global_step, self._in_step = self._global_step, trainer.global_step, False
        if self._measured:
            self._end_phase("optimizer")
            now = {f"memory/{name}": value for name, value in self.meter.read().items()} | {"memory/peak": self._step_peak}
            log_scalars(trainer, {tag: value / MIB for tag, value in (now | self._readings).items()}, step)
        if self.table and step == self._first_step + 1:
            self._show_table(trainer, pl_module, step)
        if self._snapshot_due:
            self._snapshot(trainer, f"step={step:06d}-rank={trainer.global_rank}", step)
            self._snapshot_due = False
            if not self.record_history:
                stop_history()

    def _show_table(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if not trainer.is_global_zero:
            return
        text = markdown_table(self.table, f"Memory by category on {pl_module.device}, step {step}")
        print(text, flush=True)
        for writer in summary_writers(trainer):
            writer.add_text("memory/table", text, step)

    def _snapshot(self, trainer: Trainer, name: str, step: int) -> None:
        details = {"step": step, "memory_bytes": self.meter.read(), "table_bytes": self.table, "phases_bytes": self._readings}
        path = write_snapshot(self._folder(trainer), name, self._on_gpu, details)
        self.snapshots.append(path)
        print(f"memory snapshot: {path}", flush=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Where memory ran out, say so and write the snapshot; stop recording; the error goes on its way."""
        if self._activations is not None:
            self._activations.stop()
            self._activations = None
        if is_out_of_memory(exception):
            step = trainer.global_step
            used = ", ".join(f"{name} {value / MIB:,.0f} MiB" for name, value in self.meter.read().items())
            print(f"out of memory at step {step}, rank {trainer.global_rank}: {used}", flush=True)
            try:
                self._snapshot(trainer, f"out-of-memory-step={step:06d}-rank={trainer.global_rank}", step)
            except OSError as error:  # must not hide what ran out
                print(f"no memory snapshot: {error}", flush=True)
        self._stop_recording()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop recording."""
        self._stop_recording()

    def _stop_recording(self) -> None:
        if self.record_history or self._snapshot_due:
            stop_history()
        self._snapshot_due = False
