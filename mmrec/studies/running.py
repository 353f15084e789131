"""Many runs of a study, one after the other or side by side, each result kept as it comes."""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from mmrec.measuring.failures import Failure
from mmrec.measuring.machine import device, machine
from mmrec.measuring.processes import map_in_processes
from mmrec.studies.row_file import RowFile
from mmrec.studies.runs import Row, Run
from mmrec.studies.training import check

_LONGEST = 3600.0 * 24  # seconds a run may take


def choose_gpu(worker: int) -> None:
    """Called in a worker's process: workers take the GPUs in turn; one thread each, as the GPU does the work."""
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(worker % torch.cuda.device_count())


def workers_for(workers_per_gpu: int) -> int:
    """How many processes `run_all` shall use; without a GPU 0, which is this one."""
    return workers_per_gpu * torch.cuda.device_count() if torch.cuda.is_available() else 0


def missing(runs: Sequence[Run], file: RowFile, rows_of: Callable[[Run], Iterable[Row]]) -> list[Run]:
    """The runs of which a file lacks a row, as after an interruption; how many it has is printed.

    Args:
        runs: all of them.
        file: what is there already.
        rows_of: of each row that a run will give, the columns that are known before.
    """
    of_this_gpu = {"gpu": machine(device())["gpu"]}

    def lacking(known: Row) -> bool:
        return file.lacks({name: value for name, value in known.items() if name != "params_m"} | of_this_gpu)  # counted after training

    left = [run for run in runs if any(map(lacking, rows_of(run)))]
    print(f"{len(runs) - len(left)} of {len(runs)} runs are in {file.path}", flush=True)
    return left


def run_all(measure: Callable[[Run], Any], runs: Sequence[Run], workers: int, keep: Callable[[Any], str]) -> list[str]:
    """Measure all runs, printing a line of each as it comes.

    Args:
        measure: trains a run and returns what is wanted of it; of the top of a module, so that a fresh interpreter can import it.
        runs: all of them.
        workers: processes; 0 runs everything in this one.
        keep: stores a result, and says what shall be printed of it.

    Returns:
        What failed, a line each.

    Raises:
        ValueError, OSError, ModuleNotFoundError: bad settings of any run, before the first is trained.
    """
    for run in runs:
        check(run)
    failures: list[str] = []
    done = 0

    def take(run: Run, result: Any) -> None:
        nonlocal done
        done += 1
        said = result.reason if isinstance(result, Failure) else keep(result)
        line = f"{run.title}: {said}"
        if isinstance(result, Failure):
            failures.append(line)
        print(f"[{done}/{len(runs)}] {line}", flush=True)

    map_in_processes(measure, runs, workers, _LONGEST, initialize=choose_gpu, on_result=take)
    return failures


class Plan(NamedTuple):
    """What a study's command shall measure.

    Attributes:
        measure: trains a run and returns what is wanted of it; see `run_all`.
        runs: all of them.
        rows_of: of each row that a run will give, the columns that are known before.
    """

    measure: Callable[[Run], Any]
    runs: Sequence[Run]
    rows_of: Callable[[Run], Iterable[Row]]


def carry_out(options: argparse.Namespace, file: RowFile, plan: Callable[[], Plan], keep: Callable[[Any], str]) -> list[str]:
    """Do what the options of `add_common_options` ask for: nothing, what is missing, or all of it.

    Args:
        options: the command's.
        file: where the rows go.
        plan: makes the plan; not called where only the plots are wanted.
        keep: see `run_all`.

    Returns:
        What failed, a line each.

    Raises:
        BadInputError: only plots are wanted, and there is nothing to draw.
    """
    if options.plot_only:
        file.require_rows()
        return []
    measure, runs, rows_of = plan()
    if options.only_missing:
        runs = missing(runs, file, rows_of)
    return run_all(measure, runs, workers_for(options.workers_per_gpu), keep)


def finish(lines: Iterable[str], failures: Sequence[str]) -> int:
    """Print what came of a study, then what failed on the standard error.

    Returns:
        The exit code: 1 where something failed.
    """
    for line in lines:
        print(line)
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0
