"""A `fit` whose other node never comes says what it waits for, and ends when it is told to."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import environment, session

SCRIPT = """
import os
import signal

from mmrec.commandline import peer_wait

peer_wait.FIRST_SECONDS, peer_wait.AGAIN_SECONDS = 0.5, 2.0
begin = peer_wait.PeerWait.__init__


def begin_late(self, trainer):
    os.kill(os.getpid(), signal.SIGTERM)
    begin(self, trainer)


if os.environ.get("SIGNAL_BEFORE"):
    peer_wait.PeerWait.__init__ = begin_late
if __name__ == "__main__":
    from mmrec.cli import main

    main()
"""
DEADLINE = 90.0  # seconds; the machine may be busy
WAITING = "waiting for the other processes at "


class LonelyFit:
    """A `fit` of the first of two nodes, in a session of its own."""

    def __init__(self, folder: Path, config: Path, devices: int, **variables: str) -> None:
        (folder / "lonely_fit.py").write_text(SCRIPT)
        self.log = folder / "log"
        options = ["--trainer.num_nodes", "2", "--trainer.devices", str(devices), "--trainer.strategy", "ddp"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(folder / "lonely_fit.py"), "fit", "--config", str(config), *options],
                env=environment(**variables),
                cwd=folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str, count: int = 1) -> None:
        end = time.monotonic() + DEADLINE
        while self.output().count(text) < count:
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < end, f"no {text!r} within {DEADLINE} s: {self.output()}"
            time.sleep(0.05)

    def all_gone(self) -> bool:
        """Whether no process is left, after a while for those that were killed."""
        end = time.monotonic() + 10
        while session(self.process.pid) and time.monotonic() < end:
            time.sleep(0.05)
        return not session(self.process.pid)

    def kill(self) -> None:
        for process in session(self.process.pid):
            os.kill(process, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def lonely_fit(tmp_path: Path, tiny_config: Path, request: pytest.FixtureRequest) -> Iterator[LonelyFit]:
    run = LonelyFit(tmp_path, tiny_config, request.param)
    yield run
    run.kill()


@pytest.mark.parametrize("lonely_fit", [1, 2], indirect=True)
def test_sigterm_ends_the_wait_and_the_children(lonely_fit: LonelyFit) -> None:
    lonely_fit.wait_for(WAITING, 2)  # the second time
    devices = len(session(lonely_fit.process.pid))
    assert f": this is rank 0 of {2 * devices}; is every node started, with the same trainer.num_nodes (2) and" in lonely_fit.output()
    lonely_fit.process.send_signal(signal.SIGTERM)
    assert lonely_fit.process.wait(20) == 143
    assert lonely_fit.all_gone()
    told = lonely_fit.output().partition("stopped by ")[2]
    assert told == "SIGTERM while waiting for the other processes: there is nothing to save\n"


@pytest.mark.parametrize("lonely_fit", [2], indirect=True)
def test_an_interrupt_of_all_is_one_line(lonely_fit: LonelyFit) -> None:
    lonely_fit.wait_for(WAITING)
    lonely_fit.wait_for("GLOBAL_RANK: 1,")  # the child waits, too
    os.killpg(lonely_fit.process.pid, signal.SIGINT)  # as a terminal does
    assert lonely_fit.process.wait(20) == 130
    assert lonely_fit.all_gone()
    assert lonely_fit.output().count("stopped by ") == 1
    assert "Traceback" not in lonely_fit.output()


@pytest.mark.parametrize("lonely_fit", [1], indirect=True)
def test_sigusr1_waits_on(lonely_fit: LonelyFit) -> None:
    lonely_fit.wait_for(WAITING)
    lonely_fit.process.send_signal(signal.SIGUSR1)
    seen = lonely_fit.output().count(WAITING)
    lonely_fit.wait_for(WAITING, seen + 2)
    assert "stopped by" not in lonely_fit.output()


def test_a_sigterm_before_the_wait_ends_it(tmp_path: Path, tiny_config: Path) -> None:
    run = LonelyFit(tmp_path, tiny_config, 2, SIGNAL_BEFORE="1")
    try:
        assert run.process.wait(DEADLINE) == 143
        assert run.all_gone()
        assert "stopped by SIGTERM while waiting for the other processes" in run.output()
    finally:
        run.kill()
