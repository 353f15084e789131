"""A map over items in processes: what errors, crashes and hangs become, and who takes which item."""

import os
import time

import pytest

from mmrec.measuring.failures import Failure
from mmrec.measuring.processes import map_in_processes


def break_cuda(item: str) -> str:
    if item == "breaks":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return f"{item} by {os.getpid()}"


INVALID = Failure("ValueError: invalid literal for int() with base 10: 'x'")


def put_worker_into_environment(worker: int) -> None:
    os.environ["WORKER"] = str(worker)


def test_errors_and_crashes_are_results() -> None:
    assert map_in_processes(int, ["5", "x"], workers=0, seconds=1) == [5, INVALID]
    # Each item ends its process; the next one gets another.
    found = map_in_processes(os._exit, [7, 8], workers=1, seconds=60)
    assert found == [Failure("its process died (exit code 7)"), Failure("its process died (exit code 8)")]


def test_a_process_serves_item_after_item_and_an_error_does_not_end_it() -> None:
    seen: list[tuple[object, object]] = []
    found = map_in_processes(int, ["1", "x", "3"], workers=1, seconds=60, on_result=lambda *pair: seen.append(pair))
    assert found == [1, INVALID, 3]
    assert seen == [("1", 1), ("x", INVALID), ("3", 3)]


def test_a_hang_ends_after_its_seconds_and_the_next_item_is_served() -> None:
    assert map_in_processes(time.sleep, [60, 0], workers=1, seconds=5) == [Failure("no answer within 5 s"), None]


def test_workers_know_their_number_and_none_is_started_in_vain() -> None:
    found = map_in_processes(os.getenv, ["WORKER", "WORKER"], workers=4, seconds=60, initialize=put_worker_into_environment)
    assert set(found) <= {"0", "1"}
    assert map_in_processes(int, [], workers=4, seconds=60) == []


def test_after_a_broken_cuda_context_the_next_item_gets_another_process() -> None:
    before, broken, after, last = map_in_processes(break_cuda, ["a", "breaks", "b", "c"], workers=1, seconds=60)
    assert broken == Failure("RuntimeError: CUDA error: an illegal memory access was encountered")
    assert before.startswith("a by ")
    assert after.startswith("b by ")
    assert before.split()[-1] != after.split()[-1] == last.split()[-1]


def test_an_error_of_who_keeps_the_results_ends_everything() -> None:
    seen: list[object] = []

    def keep(item: object, result: object) -> None:
        seen.append(item)
        raise OSError("no space left")

    began = time.monotonic()
    with pytest.raises(OSError, match="no space left"):
        map_in_processes(time.sleep, [0, 60, 0, 0], workers=2, seconds=90, on_result=keep)
    assert seen == [0]
    assert time.monotonic() - began < 45
