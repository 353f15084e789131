"""Ranks of one job as forks of the test's process: what is imported here need not be imported there again."""

import json
import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import fault_run
import torch
from processes import environment, free_port, run_python


def run_ranks(function: Callable[..., None], world: int, *arguments: Any, seconds: float = 120) -> list[int | None]:
    """Call `function(*arguments)` in so many forks that find each other as Lightning's processes do; their exit codes, None if too slow."""
    context, port = multiprocessing.get_context("fork"), free_port()
    processes = [context.Process(target=_rank, args=(rank, world, port, function, arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def train_on_ranks(options: Mapping[str, Any], world: int) -> list[dict[str, Any]]:
    """`fault_run.train` on ranks, to the end; what each left."""
    codes = run_ranks(fault_run.train, world, {**options, "devices": world})
    if codes != [0] * world:
        raise AssertionError(f"the ranks ended with {codes}; None: not within the time given")
    return fault_run.results(options["folder"], world)


def train_in_processes(options: Mapping[str, Any], world: int, seconds: float = 300, **variables: str) -> list[dict[str, Any]]:
    """The same in processes that share nothing with the test's, whose threads a fork would lack: for what compiles, or needs a GPU."""
    given = json.dumps({**options, "devices": world}, default=str)
    run_python(fault_run.__file__, given, seconds=seconds, env=environment(**variables))
    return fault_run.results(options["folder"], world)


def _rank(rank: int, world: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0}
    os.environ |= {name: str(value) for name, value in address.items()}
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    code = 0
    try:
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)  # without what pytest would do at its end
