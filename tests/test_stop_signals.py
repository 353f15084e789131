"""Stop signals are a flag until the process has ended, whatever comes how often."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmrec.stop_signals import (
    STOP_SIGNALS,
    default_interrupt,
    default_stop_signals,
    keep_interrupt,
    keep_stop_signals,
    received_stop_signal,
    stop_signals_kept,
)

ROOT = Path(__file__).parents[1]


def test_the_first_signal_is_remembered() -> None:
    keep_stop_signals()
    assert received_stop_signal() == 0
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert received_stop_signal() == signal.SIGUSR1
    keep_stop_signals()
    assert received_stop_signal() == 0


def test_they_can_be_given_back() -> None:
    assert not stop_signals_kept()
    keep_stop_signals()
    assert stop_signals_kept()
    default_stop_signals()
    assert not stop_signals_kept()
    assert all(signal.getsignal(number) is signal.SIG_DFL for number in STOP_SIGNALS)


def test_another_thread_changes_nothing() -> None:
    thread = threading.Thread(target=keep_stop_signals)
    thread.start()
    thread.join()
    assert not stop_signals_kept()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C interrupts, as it does in a program that a shell starts; the test's own process may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_first_interrupt_is_a_flag(interruptible: None, capfd: pytest.CaptureFixture[str]) -> None:
    keep_stop_signals()
    keep_interrupt("once more\n")
    os.kill(os.getpid(), signal.SIGINT)
    assert received_stop_signal() == signal.SIGINT
    assert capfd.readouterr().err == "once more\n"
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_is_given_back_and_what_others_made_of_it_stays(interruptible: None) -> None:
    keep_interrupt("")
    default_interrupt()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_interrupt("")
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    default_interrupt()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("late", [False, True], ids=["in time", "while Python shuts down"])
def test_a_second_signal_leaves_the_exit_code_alone(late: bool) -> None:
    kill = "for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM): os.kill(os.getpid(), number)"
    # An object whose end comes with the interpreter's own, behind everything that `atexit` runs.
    last = f"class Last:\n def __del__(self, os=os, signal=signal):\n  {kill}\nsys.last = Last()"
    program = ["import os, signal, sys", "from mmrec.stop_signals import keep_stop_signals", "keep_stop_signals()"]
    program += [last if late else kill, "raise SystemExit(7)"]
    done = subprocess.run([sys.executable, "-c", "\n".join(program)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
