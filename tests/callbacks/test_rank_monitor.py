"""The verdict on a rank that died, hangs or failed reaches every other; beats and time are made by hand, only one thread runs for real."""

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from torch import distributed as dist

from callbacks import rank_monitor
from callbacks.rank_monitor import RankMonitor, Verdict, stacks


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Broken:
    """A store whose server is gone."""

    def add(self, *_: Any) -> int:
        raise dist.DistNetworkError("Connection reset by peer")

    check = compare_set = get = add


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(rank_monitor, "time", clock)
    return clock


@pytest.fixture
def left() -> list[int]:
    return []


def monitors(left: list[int], store: Any, world_size: int = 3, hang_after: float = 50.0, interval: float = 0.001) -> list[RankMonitor]:
    options = {"interval": interval, "dead_after": 10.0, "hang_after": hang_after, "leave": left.append}
    return [RankMonitor(store, rank, world_size, **options) for rank in range(world_size)]


def beat(some: list[RankMonitor]) -> list[Verdict | None]:
    return [monitor._beat() for monitor in some]


def test_while_all_beat_there_is_no_verdict(clock: Clock, left: list[int]) -> None:
    ranks = monitors(left, dist.HashStore())
    for _ in range(20):
        clock.now += 4
        for monitor in ranks:
            monitor.progress("a batch")
        assert beat(ranks) == [None] * 3


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_rank_without_a_beat_is_dead_to_all(dead: int, clock: Clock, left: list[int]) -> None:
    ranks = monitors(left, dist.HashStore(), hang_after=0.0)
    beat(ranks)
    beat(ranks)  # a rank that beats first has now seen all others' first
    living = [monitor for rank, monitor in enumerate(ranks) if rank != dead]
    for _ in range(3):
        clock.now += 3
        assert beat(living) == [None] * 2
    for _ in range(2):
        clock.now += 3
        beat(living)
    assert beat(living) == [Verdict(dead, "is dead: no sign of life for 12 s", False)] * 2


def test_a_rank_that_makes_no_progress_hangs_and_all_are_to_show_their_stacks(clock: Clock, left: list[int]) -> None:
    ranks = monitors(left, dist.HashStore())
    for monitor in ranks:
        monitor.progress("the gradients of step 7")
    for second in range(0, 51, 3):
        clock.now += 3
        assert beat(ranks) == [None] * 3 or second == 48
        ranks[0].progress("a batch")
        ranks[2].progress("a batch")
    beat(ranks)
    assert beat(ranks) == [Verdict(1, "hangs: nothing new for 51 s since the gradients of step 7", True)] * 3


@pytest.mark.parametrize("waits", [0, 2])
def test_a_rank_that_hangs_since_another_is_silent_does_not_name_itself(waits: int, clock: Clock, left: list[int]) -> None:
    ranks = monitors(left, dist.HashStore(), hang_after=9.0, interval=2.0)
    beat(ranks)
    beat(ranks)
    living = [ranks[0], ranks[2]]
    for _ in range(3):
        ranks[2 - waits].progress("a batch")
        clock.now += 4  # in the first, rank 0 sees rank 1's last
        beat(living)
    assert beat(living) == [Verdict(1, "is dead: no sign of life for 8 s", True)] * 2


def test_zero_never_hangs(clock: Clock, left: list[int]) -> None:
    ranks = monitors(left, dist.HashStore(), hang_after=0.0)
    for _ in range(100):
        clock.now += 9
        assert beat(ranks) == [None] * 3


def test_the_first_verdict_stays(clock: Clock, left: list[int], capfd: pytest.CaptureFixture[str]) -> None:
    ranks = monitors(left, dist.HashStore())
    ranks[1].fail("ValueError: no more tea")
    ranks[0].fail("RuntimeError: Connection closed by peer")
    assert capfd.readouterr().err.splitlines()[0] == "rank 1 failed: ValueError: no more tea"
    assert beat(ranks) == [Verdict(1, "failed: ValueError: no more tea", False)] * 3


def test_without_a_store_rank_0_is_gone(clock: Clock, left: list[int]) -> None:
    ranks = monitors(left, Broken(), world_size=2)
    assert ranks[1]._beat() == Verdict(0, "has ended: its store cannot be reached (Connection reset by peer)", False)
    assert ranks[0]._beat() is None
    stopped = monitors(left, Broken(), world_size=2)[1]
    stopped.stop()  # the run is over, and rank 0 was faster
    assert stopped._beat() is None


def test_the_thread_prints_the_cause_and_the_stacks_and_leaves(left: list[int], capfd: pytest.CaptureFixture[str]) -> None:
    ended = threading.Event()
    ranks = monitors(left, dist.HashStore(), world_size=2)
    ranks[1]._leave = lambda code: (left.append(code), ended.set())
    ranks[0]._propose(Verdict(0, "hangs: nothing new", True))
    ranks[1].start()
    assert ended.wait(60)
    lines = capfd.readouterr().err.splitlines()
    assert lines[:2] == ["rank 1 ends, since rank 0 hangs: nothing new", "stacks of rank 1:"]
    assert any("test_rank_monitor.py" in line and "test_the_thread_prints" in line for line in lines)  # the main thread's
    assert left == [1]


def test_a_thread_that_is_stopped_leaves_no_more(left: list[int]) -> None:
    ranks = monitors(left, dist.HashStore(), world_size=2)
    for monitor in ranks:
        monitor.start()
        monitor.stop()
        assert not monitor._thread.is_alive()
    assert left == []


@contextlib.contextmanager
def deaf(kind: str) -> Iterator[None]:
    """A standard error that takes nothing: a file on a full disk, or the pipe of a `tee` that has ended."""
    if kind == "full disk":
        taken = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, taken = os.pipe()
        os.close(reader)
    kept = os.dup(2)
    os.dup2(taken, 2)
    try:
        with pytest.raises(OSError, match=r"No space left|Broken pipe"):
            os.write(2, b"anything")
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(taken)


KINDS = ["full disk", "reader gone"]


def followed(monitor: RankMonitor) -> None:
    """Let the thread run to its end, of itself or by an exception."""
    monitor.start()
    monitor._thread.join(60)
    assert not monitor._thread.is_alive()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_stacks", [False, True])
def test_the_thread_leaves_though_it_cannot_say_why(kind: str, with_stacks: bool, left: list[int]) -> None:
    ranks = monitors(left, dist.HashStore(), world_size=2)
    ranks[0]._propose(Verdict(0, "hangs: nothing new", with_stacks))
    with deaf(kind):
        followed(ranks[1])
    assert left == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_is_told_to_the_others_where_it_cannot_be_written(kind: str, clock: Clock, left: list[int]) -> None:
    ranks = monitors(left, dist.HashStore())
    with deaf(kind):
        ranks[1].fail("ValueError: no more tea")
    assert beat(ranks) == [Verdict(1, "failed: ValueError: no more tea", False)] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_that_can_be_told_to_nobody_is_no_other_error(kind: str, clock: Clock, left: list[int]) -> None:
    with deaf(kind):
        monitors(left, Broken())[1].fail("ValueError: no more tea")


def test_a_failure_is_told_to_the_others_whatever_comes_in_between(clock: Clock, left: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(text: str) -> None:
        raise KeyboardInterrupt

    ranks = monitors(left, dist.HashStore())
    monkeypatch.setattr(rank_monitor, "write_error", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ranks[0].fail("ValueError: no more tea")
    assert beat(ranks) == [Verdict(0, "failed: ValueError: no more tea", False)] * 3
    assert clock.now > 100  # rank 0 has lingered


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_thread_leaves_whatever_it_says_raises(left: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(text: str) -> None:
        raise MemoryError

    monkeypatch.setattr(rank_monitor, "write_error", broken)
    ranks = monitors(left, dist.HashStore(), world_size=2)
    ranks[0]._propose(Verdict(0, "failed: ValueError: no more tea", False))
    followed(ranks[1])
    assert left == [1]


def test_a_store_that_fails_without_a_word_is_named(clock: Clock, left: list[int], capfd: pytest.CaptureFixture[str]) -> None:
    class Silent(Broken):
        def compare_set(self, *_: Any) -> None:
            raise dist.DistNetworkError

    monitors(left, Silent())[1].fail("ValueError: no more tea")
    assert capfd.readouterr().err.splitlines()[1] == "rank 1: the others could not be told (DistNetworkError)"


def test_a_name_that_is_no_utf_8_is_told(clock: Clock, left: list[int], capfd: pytest.CaptureFixture[str]) -> None:
    ranks = monitors(left, dist.HashStore())
    ranks[1].fail("OSError: no \udcff.txt")  # as os.fsdecode gives it
    assert capfd.readouterr().err == "rank 1 failed: OSError: no \\udcff.txt\n"
    assert beat(ranks) == [Verdict(1, "failed: OSError: no \udcff.txt", False)] * 3


def test_without_room_for_a_temporary_file_there_are_no_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    assert stacks() == "not to be had without a temporary file ([Errno 28] No space left on device)"


def test_stacks_hold_every_thread() -> None:
    waiting, go_on = threading.Event(), threading.Event()

    def sleeper() -> None:
        waiting.set()
        go_on.wait(60)

    thread = threading.Thread(target=sleeper)
    thread.start()
    waiting.wait(60)
    found = stacks()
    go_on.set()
    thread.join()
    assert "in sleeper" in found
    assert "in test_stacks_hold_every_thread" in found
