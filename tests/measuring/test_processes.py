"""A map over items in processes: what errors, crashes and hangs become, and who takes which item."""

import os
import time

from mmrec.measuring.failures import Failure
from mmrec.measuring.processes import map_in_processes

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
