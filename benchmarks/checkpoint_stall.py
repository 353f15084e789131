"""What a checkpoint costs the training: the time of N steps with one saved before the first of them, against N steps without.

`python benchmarks/checkpoint_stall.py --size h100_1b3 --accumulate 1 --output FILE.json` on a GPU; `--size tiny` tries it on a CPU. The
Trainer, the module and the optimiser are those of `fit` with that config, the tokens are made up. Stretches of N steps without a
checkpoint, with one written in the background, and with one that training waits for, follow each other in turn; the device is waited for
between them. The first checkpoint of the background, for which host memory is made, is timed apart. Of each kind `lost_steps` is what a
checkpoint costs in steps, and `lost_share` the same over the N steps. A shorter step (`--accumulate 1`) makes both larger.
"""

import json
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader
from train_step_worker import RandomTokens

from callbacks import AtomicCheckpointIO, BackgroundCheckpointIO, RandomStates
from lightning_modules import MMRecLightningModule
from mmrec.commandline.configs import config_layers, merge
from mmrec.commandline.library_warnings import ignore_known_warnings
from mmrec.commandline.plain_parser import PlainParser, output_file, whole_number
from mmrec.config import MMRecConfig
from mmrec.files import write_atomically
from mmrec.measuring.machine import device, machine, software, synchronize

BACKGROUND, WAITED_FOR, NONE = "background", "waited_for", "none"
WARMUP = 5  # steps: compiling, capturing
TINY = "cpu_tiny"

Row = dict[str, Any]


class Stretches(Callback):
    """Cuts the training into stretches of `steps` optimiser steps and times each, with a checkpoint of its kind saved at its start.

    Attributes:
        rows: one a stretch, in their order.
        first_save_s: seconds that the first save in the background held the training up.
        checkpoint_mib: size of a checkpoint.
        total: steps that the Trainer must be given.
    """

    def __init__(self, folder: Path, steps: int, repeats: int) -> None:
        self.folder, self.steps = folder, steps
        self.kinds = [NONE, *[BACKGROUND, WAITED_FOR, NONE] * repeats]
        self.total = WARMUP + steps * len(self.kinds)
        self.ios = {BACKGROUND: BackgroundCheckpointIO(), WAITED_FOR: AtomicCheckpointIO()}
        self.rows: list[Row] = []
        self.first_save_s = self.checkpoint_mib = 0.0
        self._seen = 0
        self._begun = 0.0
        self._written: float | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        """End a stretch and begin the next, where the optimiser has stepped often enough."""
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        if self._seen < WARMUP or (self._seen - WARMUP) % self.steps:
            return
        synchronize(pl_module.device)
        now = time.perf_counter()
        if self._seen == WARMUP:
            self._save(trainer, BACKGROUND)
            self.first_save_s = time.perf_counter() - now
        else:
            self.rows[-1]["seconds"] = now - self._begun
        self._settle()
        if len(self.rows) < len(self.kinds):
            self._begin(trainer, self.kinds[len(self.rows)])

    def _begin(self, trainer: Trainer, kind: str) -> None:
        self.rows.append({"kind": kind, "held_up_s": 0.0, "written_after_s": None})
        self._begun = time.perf_counter()
        if kind != NONE:
            self._save(trainer, kind)
            self.rows[-1]["held_up_s"] = time.perf_counter() - self._begun

    def _save(self, trainer: Trainer, kind: str) -> None:
        trainer.strategy.checkpoint_io = self.ios[kind]
        trainer.save_checkpoint(self.folder / f"{kind}.ckpt", weights_only=False)
        self.ios[kind].then(self._note)

    def _note(self) -> None:
        self._written = time.perf_counter()

    def _settle(self) -> None:
        """Wait for what is still being written: the next stretch must not pay for it."""
        self.ios[BACKGROUND].wait()
        if self.rows and self._written is not None:
            self.rows[-1]["written_after_s"] = self._written - self._begun
        self._written = None
        for path in self.folder.iterdir():
            self.checkpoint_mib = path.stat().st_size / 2**20
            path.unlink()


def summary(rows: Sequence[Row], steps: int) -> dict[str, Any]:
    """What a checkpoint of each kind costs.

    Args:
        rows: stretches with `kind` and `seconds`.
        steps: optimiser steps of each.
    """
    plain = median(row["seconds"] for row in rows if row["kind"] == NONE)
    spread = max(abs(row["seconds"] - plain) for row in rows if row["kind"] == NONE)
    found: dict[str, Any] = {"step_s": plain / steps, "spread_of_plain_stretches": spread / plain}
    for kind in (BACKGROUND, WAITED_FOR):
        lost = median(row["seconds"] for row in rows if row["kind"] == kind) - plain
        held_up = median(row["held_up_s"] for row in rows if row["kind"] == kind)
        found[kind] = {"lost_s": lost, "lost_steps": lost / (plain / steps), "lost_share": lost / plain, "held_up_s": held_up}
    return found


def measure(options: Namespace, folder: Path) -> dict[str, Any]:
    """Train, and sum up."""
    config = merge(config_layers(TINY if options.size == "tiny" else options.size))
    data, where = config["data"]["init_args"], device()
    accumulate = options.accumulate or config["trainer"].get("accumulate_grad_batches", 1)
    network = MMRecConfig(**config["model"].pop("network"))
    torch.manual_seed(0)
    with where:
        module = MMRecLightningModule(network, **config["model"])
    stretches = Stretches(folder, options.steps, options.repeats)
    trainer = Trainer(
        accelerator="gpu" if where.type == "cuda" else "cpu",
        devices=1,
        precision=config["trainer"].get("precision", "32-true"),
        gradient_clip_val=config["trainer"].get("gradient_clip_val", 1.0),
        accumulate_grad_batches=accumulate,
        max_steps=stretches.total,
        log_every_n_steps=10**6,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RandomStates(), stretches],
    )
    batch = options.batch_size or data["batch_size"]
    tokens = RandomTokens(batch, data["seq_len"], network.vocab_size)
    trainer.fit(module, DataLoader(tokens, batch_size=None, pin_memory=where.type == "cuda"))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return {
        **machine(device()),
        **software(),
        "config": TINY if options.size == "tiny" else options.size,
        "parameters": parameters,
        "tokens_a_step": batch * data["seq_len"] * accumulate,
        "accumulate": accumulate,
        "steps": options.steps,
        "checkpoint_mib": stretches.checkpoint_mib,
        "first_save_s": stretches.first_save_s,
        **summary(stretches.rows, options.steps),
        "stretches": stretches.rows,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write JSON, print what was lost.

    Args:
        arguments: what follows the program's name; None: `sys.argv`.
    """
    parser = PlainParser(description=__doc__)
    parser.add_argument("--size", default="tiny", help="tiny, or the name of a config (default tiny)")
    parser.add_argument("--steps", type=whole_number, default=100, help="optimiser steps of a stretch (default 100)")
    parser.add_argument("--repeats", type=whole_number, default=2, help="stretches with a checkpoint of each kind (default 2)")
    parser.add_argument("--accumulate", type=whole_number, help="micro-batches a step; default: the config's")
    parser.add_argument("--batch-size", type=whole_number, help="sequences of a micro-batch; default: the config's")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on whose disk checkpoints are written")
    parser.add_argument("--output", type=output_file, required=True, help="the JSON file to write")
    options = parser.parse_args(arguments)
    ignore_known_warnings()
    with tempfile.TemporaryDirectory(prefix="mmrec-stall-", dir=options.folder) as folder:
        result = measure(options, Path(folder))
    write_atomically(options.output, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    print(f"a step: {result['step_s']:.4f} s; {result['checkpoint_mib']:,.0f} MiB a checkpoint")
    for kind in (BACKGROUND, WAITED_FOR):
        found = result[kind]
        print(f"{kind}: {found['lost_s']:.3f} s lost, {found['lost_steps']:.2f} steps, {found['lost_share']:.2%} of {options.steps} steps")


if __name__ == "__main__":
    main()
