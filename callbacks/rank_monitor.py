"""RankMonitor: a thread of every rank that knows when another one has died, failed or hangs, and ends this one then."""

import contextlib
import faulthandler
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

_PREFIX = "mmrec/ranks"
_VERDICT = f"{_PREFIX}/verdict"
_HANG = f"{_PREFIX}/hang"
_QUIET = 3  # intervals without a beat, by which a rank is the likelier cause of a hang than the one that waits for it
EXIT_CODE = 1


class Verdict(NamedTuple):
    """Why all ranks end: the first `rank` that something was wrong with, what it was, and whether every rank's stacks would help."""

    rank: int
    text: str
    stacks: bool


class RankMonitor:
    """Beats into the store of `torch.distributed` and listens there, every `interval` seconds, whatever the main thread does.

    Rank 0 looks at all beats, the others at rank 0's alone, so that a beat costs two or three small requests however many there are. The
    first to find a fault writes the verdict, which every rank reads, prints and follows: by `os._exit`, as a main thread that waits in a
    collective hears nothing else. Where the store itself is gone, rank 0, whose process holds it, is. A rank that hangs tells rank 0, whose
    verdict it is: a rank that has not beaten for three intervals is what the others wait for, and is named instead.

    Args:
        store: a client of its own, for a call in it locks it; requests must not wait longer than `dead_after`.
        rank, world_size: this process among all.
        interval: seconds between beats.
        dead_after: seconds without a beat after which a rank is taken for dead.
        hang_after: seconds without `progress` after which a rank hangs; 0: never.
        leave: ends the process; called in the thread.
        on_verdict: called as soon as this rank is about to end for a fault, its own or another's.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        *,
        interval: float,
        dead_after: float,
        hang_after: float,
        leave: Callable[[int], Any] = os._exit,
        on_verdict: Callable[[], Any] = lambda: None,
    ) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self.interval, self.dead_after, self.hang_after = interval, dead_after, hang_after
        self._leave, self._on_verdict = leave, on_verdict
        self._stopping = threading.Event()
        self._seen: dict[int, tuple[int, float]] = {}  # by rank, the latest beat and when it was new
        self._what, self._since = "starting", time.monotonic()
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="rank-monitor", daemon=True)

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread: the run is over, and ranks may leave."""
        self._stopping.set()
        if threading.current_thread() is not self._thread and self._thread.is_alive():
            self._thread.join(self.dead_after)

    def progress(self, what: str) -> None:
        """The main thread has come to something new, `what`, and does not hang."""
        self._what, self._since = what, time.monotonic()

    def fail(self, message: str) -> None:
        """This rank is about to end with an error: say so on its standard error before any other does, and tell the others."""
        self._failed = True
        try:
            self._on_verdict()
            write_error(f"rank {self._rank} failed: {message}")
        finally:  # whatever comes in between: the others wait in a collective
            self._propose(Verdict(self._rank, f"failed: {message}", False))
            self.linger()

    def wait_for_others(self) -> None:
        """Give another rank's death the time to show: the thread then ends this process, and this does not return."""
        self._stopping.wait(self.dead_after + 3 * self.interval)

    def linger(self) -> None:
        """As rank 0, whose process holds the store, stay until the others have read the verdict."""
        if self._rank == 0:
            time.sleep(2 * self.interval)

    # ---- the thread

    def _run(self) -> None:
        while not self._stopping.wait(self.interval):
            verdict = self._beat()
            if verdict is not None and not self._stopping.is_set():
                return self._follow(verdict)
        return None

    def _beat(self) -> Verdict | None:
        try:
            self._store.add(f"{_PREFIX}/beat/{self._rank}", 1)
            self._look_for_dead(range(1, self._world_size) if self._rank == 0 else (0,))
            self._look_for_hanging()
        except RuntimeError as error:  # torch's DistStoreError and DistNetworkError among them
            if self._rank == 0 or self._stopping.wait(self.interval):
                return None  # all end, and the store with them
            return Verdict(0, f"has ended: its store cannot be reached ({_first_line(error)})", False)
        return self._verdict()

    def _look_for_hanging(self) -> None:
        seconds = time.monotonic() - self._since
        if self.hang_after and seconds > self.hang_after:
            hang = Verdict(self._rank, f"hangs: nothing new for {seconds:.0f} s since {self._what}", True)
            self._store.compare_set(_HANG, "", json.dumps(hang))
        if self._rank == 0 and self._store.check([_HANG]):
            self._propose(self._quietest() or Verdict(*json.loads(self._store.get(_HANG))))

    def _quietest(self) -> Verdict | None:
        """As rank 0, the rank without a beat for the longest, if that is long; what the others wait for shows in their stacks."""
        rank, (_, since) = min(self._seen.items(), key=lambda seen: seen[1][1])
        seconds = time.monotonic() - since
        return Verdict(rank, f"is dead: no sign of life for {seconds:.0f} s", True) if seconds >= _QUIET * self.interval else None

    def _look_for_dead(self, ranks: Any) -> None:
        now = time.monotonic()
        for rank in ranks:
            beat = int(self._store.add(f"{_PREFIX}/beat/{rank}", 0))
            if rank not in self._seen or self._seen[rank][0] != beat:
                self._seen[rank] = beat, now
            elif now - self._seen[rank][1] > self.dead_after:
                self._propose(Verdict(rank, f"is dead: no sign of life for {now - self._seen[rank][1]:.0f} s", False))

    def _propose(self, verdict: Verdict) -> None:
        try:
            self._store.compare_set(_VERDICT, "", json.dumps(verdict))  # of several the first stays
        except RuntimeError as error:
            write_error(f"rank {self._rank}: the others could not be told ({_first_line(error)})")

    def _verdict(self) -> Verdict | None:
        try:
            return Verdict(*json.loads(self._store.get(_VERDICT))) if self._store.check([_VERDICT]) else None
        except RuntimeError:
            return None  # the next beat says that the store is gone

    def _follow(self, verdict: Verdict) -> None:
        try:
            self._on_verdict()
            if self._failed:  # its main thread is on its way out, with a traceback and its own exit code
                self._stopping.wait(self.dead_after)
            elif not self._stopping.wait(min(1.0, self.interval)):  # its own error comes first
                lines = [f"rank {self._rank} ends, since rank {verdict.rank} {verdict.text}"]
                if verdict.stacks:
                    lines += [f"stacks of rank {self._rank}:", stacks()]
                write_error("\n".join(lines))
                self.linger()
        finally:  # a rank that only failed to speak would stay in its collective
            if not self._stopping.is_set():
                self._leave(EXIT_CODE)


def stacks() -> str:
    """Where every thread of this process is; where there is no room for a temporary file, a line that says so."""
    try:
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            return file.read().decode(errors="replace")
    except OSError as error:
        return f"not to be had without a temporary file ({error})"


def write_error(text: str) -> None:
    """Write to the standard error in one piece, so that ranks which share it do not mix their lines.

    Where that cannot be written (a file on a full disk, a pipe whose reader has gone) the text is lost: ending comes first.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))  # names of files may hold what is no UTF-8


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
