"""SIGTERM and SIGUSR1, by which a scheduler asks a run to stop, and a first Ctrl-C, kept as a flag until the run looks at it.

Imports nothing but the standard library, so that the flag is there before the libraries that take seconds to import.
"""

import atexit
import contextlib
import os
import signal
import threading

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_came: list[int] = []  # signals of the process, as its handlers are, in the order of their coming
_note_interrupt: object = None  # the handler of SIGINT that `keep_interrupt` set last


def keep_stop_signals() -> None:
    """From now on the signals do nothing but set the flag, until the process has ended; the flag is cleared.

    Later signals are taken as well: the second of two that come a moment apart must not kill the process while it saves or leaves.
    In a thread other than the main one, which may set no handlers, nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    _came.clear()
    for number in STOP_SIGNALS:
        signal.signal(number, _note)
    # Python puts the default back while it shuts down, which takes torch a second: a signal then would change the exit code.
    atexit.unregister(ignore_stop_signals)
    atexit.register(ignore_stop_signals)


def ignore_stop_signals() -> None:
    """From now on the signals do nothing."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def default_stop_signals() -> None:
    """From now on the signals end the process at once, as if nothing had been asked for here."""
    atexit.unregister(ignore_stop_signals)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def stop_signals_kept() -> bool:
    """Whether `keep_stop_signals` was called and holds."""
    return all(signal.getsignal(number) is _note for number in STOP_SIGNALS)


def keep_interrupt(told: str) -> None:
    """From now on a first Ctrl-C (SIGINT) sets the flag too; the one after it interrupts what is under way, as ever.

    Where SIGINT does anything but interrupt (a shell lets programs in its background ignore it) that stays, as it does outside the main
    thread.

    Args:
        told: what is written to the standard error when it comes; "" for nothing.
    """

    def note(number: int, frame: object) -> None:
        _note(number, frame)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.suppress(OSError):
            os.write(2, told.encode())  # not print: this may have come in the midst of one

    global _note_interrupt
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        _note_interrupt = note
        signal.signal(signal.SIGINT, note)


def default_interrupt() -> None:
    """From now on Ctrl-C interrupts what is under way, as if `keep_interrupt` had not been called."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is _note_interrupt:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def received_stop_signal() -> int:
    """The number of the first signal that came, 0 before any has."""
    return _came[0] if _came else 0


def stop_signal_came(number: int) -> bool:
    """Whether this one was among those that came, the first or not."""
    return number in _came


def _note(number: int, frame: object) -> None:
    if number not in _came:
        _came.append(number)
