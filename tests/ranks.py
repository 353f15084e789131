"""Ranks of one job as forks of a server that has imported what they need, and has no threads that a fork would lack.

Not of the test's process: where PyTorch has found a GPU, or a test has compiled something, the backward pass of a fork of it is refused.
"""

import contextlib
import faulthandler
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import fault_run
import pytest
import torch
from processes import ROOT, environment, free_port, run_python

_OUTPUT = ("stdout", "stderr")
_SERVER = forkserver.ForkServer()  # beside the process' own, which data workers come of: that one has imported less
_SERVER.set_forkserver_preload(["fault_run"])


def run_ranks(function: Callable[..., None], world: int, *arguments: Any, seconds: float = 120) -> list[int | None]:
    """Call `function(*arguments)` in so many processes that find each other as Lightning's do; their exit codes, None if too slow.

    The function is one of a module; what the processes print is printed here when all have ended, and the stacks of one that hangs.
    """
    context, port = multiprocessing.get_context("forkserver"), free_port()
    with tempfile.TemporaryDirectory() as folder:
        given = (port, folder, dict(os.environ), os.getcwd(), 0.9 * seconds, function, arguments)
        processes = [context.Process(target=_rank, args=(rank, world, *given)) for rank in range(world)]
        with _served():
            for process in processes:
                process.start()
        for process in processes:
            process.join(seconds)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        for descriptor, name in enumerate(_OUTPUT, 1):
            for path in sorted(Path(folder).glob(f"{name}-*")):
                os.write(descriptor, path.read_bytes())
    return codes


def train_on_ranks(options: Mapping[str, Any], world: int) -> list[dict[str, Any]]:
    """`fault_run.train` on ranks, to the end; what each left."""
    codes = run_ranks(fault_run.train, world, {"strategy": "ddp", **options, "devices": world})
    if codes != [0] * world:
        raise AssertionError(f"the ranks ended with {codes}; None: not within the time given")
    return fault_run.results(options["folder"], world)


def train_in_processes(options: Mapping[str, Any], world: int, seconds: float = 300, **variables: str) -> list[dict[str, Any]]:
    """The same in processes with a Python of their own: for what compiles, or needs a GPU."""
    given = json.dumps({**options, "devices": world}, default=str)
    run_python(fault_run.__file__, given, seconds=seconds, env=environment(**variables))
    return fault_run.results(options["folder"], world)


@contextlib.contextmanager
def _served() -> Iterator[None]:
    """Processes of the context `forkserver` that are started here come of the tests' server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")  # the server has no other word of where modules lie
        patch.setattr(forkserver, "connect_to_new_process", _SERVER.connect_to_new_process)
        yield


def _rank(
    rank: int,
    world: int,
    port: int,
    output: str,
    variables: dict[str, str],
    folder: str,
    seconds: float,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0}
    os.environ |= variables | {"CUDA_VISIBLE_DEVICES": ""} | {name: str(value) for name, value in address.items()}
    os.chdir(folder)
    for descriptor, name in enumerate(_OUTPUT, 1):
        os.dup2(os.open(f"{output}/{name}-{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600), descriptor)
    faulthandler.dump_traceback_later(seconds, exit=True)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    code = 0
    try:
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # without what the server would do at its end
