"""SIGTERM and SIGUSR1, by which a scheduler asks a run to stop, kept as a flag until the run looks at it.

Imports nothing but the standard library, so that the flag is there before the libraries that take seconds to import.
"""

import atexit
import signal
import threading

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_received = 0  # of the process, as its handlers are


def keep_stop_signals() -> None:
    """From now on the signals do nothing but set the flag, until the process has ended; the flag is cleared.

    Later signals are taken as well: the second of two that come a moment apart must not kill the process while it saves or leaves.
    In a thread other than the main one, which may set no handlers, nothing happens.
    """
    global _received
    if threading.current_thread() is not threading.main_thread():
        return
    _received = 0
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


def received_stop_signal() -> int:
    """The number of the first signal that came, 0 before any has."""
    return _received


def _note(number: int, frame: object) -> None:
    global _received
    _received = _received or number
