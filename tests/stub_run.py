"""A small training run over made-up tokens: imported by the tests, and a script where a test needs a process of its own.

`python stub_run.py '{"folder": ..., "max_steps": 6}'` trains and appends one line a step to `<folder>/steps-<rank>.txt`: the step, its
loss, and a number drawn from all three generators, both as hexadecimal floats.
"""

import copy
import errno
import faulthandler
import json
import os
import random
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from torch import Tensor

from callbacks import (
    AtomicCheckpointIO,
    BackgroundCheckpointIO,
    FaultTolerantTensorBoardLogger,
    RandomStates,
    RankChange,
    RunCheckpoint,
)
from lightning_modules import BaselineLightningModule, MMRecLightningModule
from mmrec.baselines import BaselineConfig
from mmrec.config import MMRecConfig

VOCAB = 32
SEQ_LEN = 8


def sequence(index: int) -> Tensor:
    """The tokens of sample `index`, int64 (SEQ_LEN + 1,)."""
    return torch.randint(0, VOCAB, (SEQ_LEN + 1,), generator=torch.Generator().manual_seed(index))


def make_batch(indices: list[int]) -> dict[str, Tensor]:
    """The samples `indices` as a batch, labels shifted by one."""
    tokens = torch.stack([sequence(index) for index in indices])
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


class StubLoader:
    """`length` batches; rank r of W takes its part of global batch g of W·batch_size samples. Knows and restores its position."""

    def __init__(self, length: int, batch_size: int, first_sample: int = 0) -> None:
        self.length, self.batch_size, self.first_sample = length, batch_size, first_sample
        self.position = 0
        self._restored = False

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        torch.empty((), dtype=torch.int64).random_()  # torch's DataLoader draws its base seed when it is iterated
        self.position, self._restored = (self.position if self._restored else 0), False
        return self._batches()

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        distributed = torch.distributed.is_initialized()
        world = torch.distributed.get_world_size() if distributed else 1
        rank = torch.distributed.get_rank() if distributed else 0
        while self.position < self.length:
            start = self.first_sample + (self.position * world + rank) * self.batch_size
            self.position += 1
            yield make_batch(list(range(start, start + self.batch_size)))

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position, self._restored = state["position"], True


class StubData(LightningDataModule):
    """Training and validation on separate samples."""

    def __init__(self, batch_size: int = 4, batches: int = 1000, validation_sources: int = 1, vocab_size: int = VOCAB) -> None:
        super().__init__()
        self.batch_size, self.batches, self.vocab_size = batch_size, batches, vocab_size
        self.validation_names = ["val"] if validation_sources == 1 else [f"source{index}" for index in range(validation_sources)]

    def train_dataloader(self) -> StubLoader:
        return StubLoader(self.batches, self.batch_size)

    def val_dataloader(self) -> list[StubLoader]:
        return [StubLoader(2, self.batch_size, 1_000_000 * (index + 1)) for index in range(len(self.validation_names))]

    test_dataloader = predict_dataloader = val_dataloader


class RecordSteps(Callback):
    """Appends to a file each step's loss, summed over its micro-batches and averaged over ranks, and a number drawn at random.

    The network itself draws nothing, so the number is what shows a lost random state. May kill the process after a step.
    """

    def __init__(self, folder: Path, kill_after: int | None = None) -> None:
        self.folder, self.kill_after = folder, kill_after
        self.sum = torch.zeros(())

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.sum = self.sum + pl_module.last_loss.loss
        if trainer.fit_loop._should_accumulate():
            return
        loss, self.sum = trainer.strategy.reduce(self.sum, reduce_op="mean"), torch.zeros(())
        drawn = float(torch.rand((), dtype=torch.float64)) + random.random() + float(np.random.rand())
        with open(self.folder / f"steps-{trainer.global_rank}.txt", "a") as file:
            file.write(f"{trainer.global_step} {float(loss).hex()} {drawn.hex()}\n")
        if trainer.global_step == self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)


def tiny_config(**changes: Any) -> MMRecConfig:
    """Two layers of width 16."""
    fields = {"vocab_size": VOCAB, "model_dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 32}
    return MMRecConfig(**(fields | changes))


def make_module(network: dict[str, Any] | None = None, seed: int = 0, **options: Any) -> MMRecLightningModule:
    """A module drawn from `seed`, with a short warm-up and a rate at which losses move."""
    torch.manual_seed(seed)
    options = {"learning_rate": 1e-2, "warmup_steps": 2} | options
    return MMRecLightningModule(tiny_config(**(network or {})), **options)


def make_baseline(seed: int = 0, **options: Any) -> BaselineLightningModule:
    """The same around a Transformer++."""
    torch.manual_seed(seed)
    network = BaselineConfig(vocab_size=VOCAB, model_dim=64, num_layers=2, num_heads=2, ffn_dim=64)
    return BaselineLightningModule(network, **{"learning_rate": 1e-2, "warmup_steps": 2} | options)


def make_trainer(folder: Path | str, callbacks: list[Callback] | None = None, **options: Any) -> Trainer:
    """A quiet Trainer on the CPU, set as the command line sets it."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 6,
        "logger": FaultTolerantTensorBoardLogger(folder, name="tb", version="", default_hp_metric=False),
        "plugins": [AtomicCheckpointIO()],
        "gradient_clip_val": 1.0,
        "num_sanity_val_steps": -1,
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, RunCheckpoint) for callback in callbacks or []),
    }
    return Trainer(default_root_dir=folder, callbacks=callbacks, **(defaults | options))


def read_steps(folder: Path, rank: int = 0) -> dict[int, tuple[float, float]]:
    """Loss and drawn number by step."""
    lines = (line.split() for line in (folder / f"steps-{rank}.txt").read_text().splitlines())
    return {int(step): (float.fromhex(loss), float.fromhex(drawn)) for step, loss, drawn in lines}


def main(options: dict[str, Any]) -> None:
    """Train as the options say."""
    options = copy.deepcopy(options)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(options.pop("folder"))
    folder.mkdir(parents=True, exist_ok=True)
    kill_after, resume = options.pop("kill_after", None), options.pop("resume", None)
    checkpoints = RunCheckpoint(every_n_steps=options.pop("checkpoint_every", 2))
    if io := options.pop("io", None):
        options["plugins"] = [BackgroundCheckpointIO() if io == "background" else AtomicCheckpointIO()]
    if failing := options.pop("failing_saves", None):
        _fail_saves(failing)
    data = StubData(**options.pop("data", {}))
    if kill_in_save := options.pop("kill_in_save", None):
        _kill_in_save(*kill_in_save)
    module = make_module(**options.pop("model", {}))
    seed_everything(options.pop("seed", 2) + 1000 * int(os.environ.get("LOCAL_RANK", 0)))
    trainer = make_trainer(folder, [RandomStates(), RankChange(), checkpoints, RecordSteps(folder, kill_after)], **options)
    trainer.fit(module, datamodule=data, ckpt_path=resume)


def _kill_in_save(step: int, size: int) -> None:
    """Die in the midst of writing the checkpoint of `step`, after `size` bytes."""
    real = torch.save

    def dying(checkpoint: dict[str, Any], file: Any) -> None:
        if checkpoint["global_step"] != step:
            return real(checkpoint, file)
        real(checkpoint, file)
        file.truncate(size)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = dying


def _fail_saves(steps: list[int]) -> None:
    """Let the disk be full when the checkpoints of `steps` are written."""
    real = torch.save

    def failing(content: Any, file: Any, **options: Any) -> None:  # what ranks tell each other is pickled through it as well
        if isinstance(content, dict) and content.get("global_step") in steps:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(content, file, **options)

    torch.save = failing


if __name__ == "__main__":
    faulthandler.dump_traceback_later(120, exit=True)  # a run that hangs ends with its stacks
    main(json.loads(sys.argv[1]))
