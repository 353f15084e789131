"""While a process waits for the others that are to train with it: a line that says so, and an end when it is told to stop."""

import os
import signal
import socket
import threading
import time
from typing import Any, Self

from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from callbacks.launched_ranks import launched_ranks
from callbacks.telling import tell
from mmrec.stop_signals import stop_signal_came

FIRST_SECONDS = 30.0  # until it is said that others are missing
AGAIN_SECONDS = 300.0  # between two times


def watch_peer_wait(trainer: Trainer) -> None:
    """Put a PeerWait around the place where Lightning waits; nothing where one process trains or Lightning forks those that do."""
    strategy: Any = trainer.strategy
    if trainer.num_nodes * trainer.num_devices == 1 or isinstance(strategy.launcher, _MultiProcessingLauncher):
        return
    setup_environment = strategy.setup_environment

    def watched() -> None:
        if threading.current_thread() is not threading.main_thread():  # which alone may ask for signals
            setup_environment()
            return
        with PeerWait(trainer):
            setup_environment()

    strategy.setup_environment = watched


class PeerWait:
    """A context in which SIGTERM and SIGINT end the process at once, with exit code 143 or 130, and its children.

    The main thread is in the C++ of `torch.distributed` then and runs no handler of Python's: a thread is told of signals by the bytes that
    Python writes to its wakeup socket for each that has such a handler. SIGUSR1, which asks for another start, keeps its handler alone: the
    run looks at its flag once all are there. Of a machine's processes the first speaks.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._thread = threading.Thread(target=self._run, name="peer-wait", daemon=True)

    def __enter__(self) -> Self:
        self._told, self._tells = socket.socketpair()
        self._tells.setblocking(False)
        self._before = signal.set_wakeup_fd(self._tells.fileno(), warn_on_full_buffer=False)
        if stop_signal_came(signal.SIGTERM):  # before there was a socket
            self._leave(signal.SIGTERM)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._before)
        self._tells.close()  # which ends the thread
        self._thread.join()
        self._told.close()

    def _run(self) -> None:
        speak_at = time.monotonic() + FIRST_SECONDS
        while True:
            self._told.settimeout(max(0.01, speak_at - time.monotonic()))
            try:
                number = self._told.recv(1)
            except TimeoutError:
                self._say(self._line())
                speak_at = time.monotonic() + AGAIN_SECONDS
                continue
            if not number:
                return
            if number[0] in (signal.SIGTERM, signal.SIGINT):
                self._leave(signal.Signals(number[0]))

    def _line(self) -> str:
        trainer, address, port = self._trainer, os.environ.get("MASTER_ADDR", "?"), os.environ.get("MASTER_PORT", "?")
        return (
            f"waiting for the other processes at {address}:{port}: this is rank {trainer.global_rank} of {trainer.world_size}; "
            f"is every node started, with the same trainer.num_nodes ({trainer.num_nodes}) and trainer.devices ({trainer.num_devices})? "
            "Without Slurm or torchrun each also needs the same MASTER_ADDR and MASTER_PORT, and its own NODE_RANK"
        )

    def _leave(self, number: signal.Signals) -> None:
        try:
            self._say(f"stopped by {number.name} while waiting for the other processes: there is nothing to save")
            for process in launched_ranks(self._trainer):
                process.kill()
        finally:
            os._exit(128 + number)

    def _say(self, line: str) -> None:
        if self._trainer.local_rank == 0:
            tell(line)
