"""A small training run in which something goes wrong on purpose: for tests to import, and a script where ranks are processes of their own.

`python fault_run.py '{"folder": ..., "faults": [{"kind": "kill", "rank": 1, "step": 3}]}'` trains and leaves `<folder>/result-<rank>.pt` of
each rank that came to the end.
"""

import copy
import faulthandler
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from stub_run import StubData, StubLoader, make_module, make_trainer
from torch.distributed.tensor import DTensor

from callbacks import LossSpikes, RandomStates, RankAgreement, RankWatch, RunCheckpoint, SkippedSteps
from lightning_modules.fsdp2_strategy import FSDP2Strategy
from lightning_modules.strategies import TunedDDPStrategy

ENDLESS = 10_000.0
PATIENCE = 5.0  # seconds
SECONDS = 270.0  # after which a run that hangs ends with its stacks


class Fault(Callback):
    """Does `kind` on `rank` in the steps from `step` to before `until`, in their micro-batch `micro_batch`.

    `nan`: what the network reads of the batch is NaN, and so is the loss. `infinite`: the loss is infinite, its gradients are not.
    `overflow`: one gradient is infinite. `spike`: the step's loss is taken to be 50 more. `raise`, `kill` (as kill −9), `stop` (as
    kill −STOP), `sleep`: before the batch. `impatient`: RankWatch takes five seconds without progress for a hang from then on.
    """

    def __init__(self, kind: str, rank: int, step: int, until: int | None = None, micro_batch: int = 0) -> None:
        self.kind, self.rank, self.micro_batch = kind, rank, micro_batch
        self.steps = range(step, step + 1 if until is None else until)
        self.now = False

    @property
    def state_key(self) -> str:
        return f"Fault-{self.kind}-{self.rank}-{self.steps.start}"

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        network = pl_module.network
        if self.kind == "nan":
            network.embedding.register_forward_hook(lambda module, inputs, output: output * float("nan") if self.now else None)
        if self.kind == "overflow":
            network.norm.weight.register_hook(lambda gradient: gradient + float("inf") if self.now else None)
        if self.kind == "infinite":
            real = network.loss

            def infinite(batch: Any, **options: Any) -> Any:
                output = real(batch, **options)
                return output._replace(loss=output.loss + float("inf")) if self.now else output

            network.loss = infinite

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        here = trainer.global_rank == self.rank and trainer.global_step in self.steps
        self.now = here and batch_idx % trainer.accumulate_grad_batches == self.micro_batch
        if not self.now:
            return
        if self.kind == "raise":
            raise ValueError(f"no more tea on rank {self.rank}")
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "impatient":
            for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning's list
                if isinstance(callback, RankWatch) and callback._monitor is not None:
                    callback._monitor.hang_after = PATIENCE
        if self.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.kind == "sleep":
            time.sleep(ENDLESS)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if self.now and self.kind == "spike":
            pl_module.last_step_loss = pl_module.last_step_loss + 50.0
        self.now = False


class Record(Callback):
    """Each logged step's loss, each step's gradient norm, weights and optimiser state after it; at the end all in a file of the rank's."""

    def __init__(self, folder: Path, weights: bool = False) -> None:
        self.folder, self.weights = folder, weights
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.after: list[Any] = []
        self.step = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        self.losses.append(float("nan") if pl_module.step_losses is None else float(pl_module.step_losses.loss))
        self.norms.append(float(pl_module.last_gradient_norm))
        if self.weights:
            self.after.append(snapshot(pl_module, trainer.optimizers[0]))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        skipped = [callback.skipped for callback in trainer.callbacks if isinstance(callback, SkippedSteps)]
        ended = {"losses": self.losses, "norms": self.norms, "after": self.after, "skipped": skipped}
        torch.save(ended | {"last": snapshot(pl_module, trainer.optimizers[0])}, self.folder / f"result-{trainer.global_rank}.pt")


class Differing(RankAgreement):
    """Has another value of `the weather` on each rank."""

    def __init__(self, values: list[str]) -> None:
        super().__init__()
        self.values = values

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.facts["the weather"] = self.values[trainer.global_rank]
        super().on_fit_start(trainer, pl_module)


class UnevenLoader(StubLoader):
    """Leaves a sequence every token's label, or only each second's to fifth's."""

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in super()._batches():
            for labels in batch["labels"]:
                every = 1 + int(labels.sum()) % 5
                labels[torch.arange(len(labels)) % every != 0] = -1
            yield batch


class UnevenData(StubData):
    """Batches with unequal numbers of labels."""

    def train_dataloader(self) -> UnevenLoader:
        return UnevenLoader(self.batches, self.batch_size)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy; of shards, of all of them, and of moments in 8 bits, what they stand for."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if hasattr(local, "dequantize") and hasattr(local, "codes"):
        return local.dequantize()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def snapshot(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Copies of all weights and of all tensors of the optimiser's state, by name."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    found = {name: whole(parameter) for name, parameter in module.named_parameters()}
    for parameter, state in optimizer.state.items():
        found |= {f"{names[parameter]}/{key}": whole(torch.as_tensor(value)) for key, value in state.items()}
    return found


def results(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """What each rank left."""
    return [torch.load(folder / f"result-{rank}.pt", weights_only=True) for rank in range(ranks)]


def train(options: dict[str, Any]) -> Trainer:
    """Train as the options say; the rest of them goes to the Trainer."""
    options = copy.deepcopy(options)
    torch.set_num_threads(1)
    folder = Path(options.pop("folder"))
    folder.mkdir(parents=True, exist_ok=True)
    callbacks: list[Callback] = [Fault(**fault) for fault in options.pop("faults", [])]
    callbacks += [SkippedSteps(options.pop("max_in_row", 10)), LossSpikes(**options.pop("spikes", {})), RandomStates()]
    if (facts := options.pop("facts", None)) is not None:  # one value a rank
        callbacks.append(Differing(facts))
    if (watch := options.pop("watch", None)) is not None:
        callbacks.append(RankWatch(**watch))
    if (every := options.pop("checkpoint_every", None)) is not None:
        callbacks.append(RunCheckpoint(every_n_steps=every, keep_best=options.get("limit_val_batches", 0) > 0))
    callbacks.append(Record(folder, options.pop("weights", False)))
    if isinstance(options.get("strategy"), dict):
        strategy = FSDP2Strategy if options["strategy"].pop("fsdp2", False) else TunedDDPStrategy
        options["strategy"] = strategy(**options["strategy"])
    kind = UnevenData if options.pop("uneven", False) else StubData
    data, module = kind(**options.pop("data", {})), make_module(**options.pop("model", {}))
    options = {"limit_val_batches": 0, "logger": False} | options
    resume = options.pop("resume", None)
    trainer = make_trainer(folder, callbacks, **options)
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return trainer


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    train(json.loads(sys.argv[1]))
