"""The other ranks that this process has started on its machine."""

import subprocess

from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher


def launched_ranks(trainer: Trainer) -> list[subprocess.Popen[bytes]]:
    """Processes that Lightning's launcher has started for this one; none where a scheduler starts them, or where ranks are forks."""
    launcher = trainer.strategy.launcher
    return launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else []
