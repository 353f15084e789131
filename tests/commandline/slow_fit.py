"""`python slow_fit.py fit …`: the command line, slow enough to be signalled at a chosen moment, and telling what it is at.

Environment: SLOW_MARKS is a folder in which rank R keeps `step-R` (its process's number and the optimiser steps taken) and makes `STAGE-R`
(the number) where it pauses; SLOW_STEP are seconds behind each batch; SLOW_STAGE is the stage to pause in for SLOW_PAUSE seconds: setup,
sanity, validation, saving or teardown.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from mmrec.cli import main

MARKS = Path(os.environ["SLOW_MARKS"])
STEP = float(os.environ.get("SLOW_STEP", "0"))
STAGE = os.environ.get("SLOW_STAGE")
PAUSE = float(os.environ.get("SLOW_PAUSE", "1"))


def mark(name: str, rank: int, *more: object) -> None:
    """Write a file in one step."""
    path = MARKS / f"{name}-{rank}"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(" ".join(str(item) for item in (os.getpid(), *more)))
    temporary.rename(path)


def pause(stage: str, rank: int) -> None:
    """If it is the one asked for, say so and wait."""
    if stage == STAGE:
        mark(stage, rank)
        time.sleep(PAUSE)


def slow_down() -> None:
    """Put the pauses into the module and into torch.save."""
    # Imported here: a data worker imports this script too, and needs no Lightning.
    from lightning_modules import MMRecLightningModule

    module, save = MMRecLightningModule, torch.save
    setup, validation_step = module.setup, module.validation_step

    def slow_setup(self: Any, stage: str) -> None:
        setup(self, stage)
        pause("setup", self.trainer.global_rank)

    def slow_validation_step(self: Any, *arguments: Any) -> None:
        validation_step(self, *arguments)
        pause("sanity" if self.trainer.sanity_checking else "validation", self.trainer.global_rank)

    def on_train_batch_end(self: Any, *arguments: Any) -> None:
        mark("step", self.trainer.global_rank, self.trainer.global_step)
        time.sleep(STEP)

    def teardown(self: Any, stage: str) -> None:
        pause("teardown", self.trainer.global_rank)

    def slow_save(content: Any, file: Any, **options: Any) -> None:
        save(content, file, **options)
        if isinstance(content, dict) and "global_step" in content:  # not what the ranks send each other
            pause("saving", 0)  # before it is flushed and renamed

    module.setup, module.validation_step = slow_setup, slow_validation_step
    module.on_train_batch_end, module.teardown = on_train_batch_end, teardown
    torch.save = slow_save


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test's process may ignore it, and what it starts would
    slow_down()
    main()
