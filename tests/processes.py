"""Processes that tests start: their environment, those of a session, a script's end."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def environment(**more: str) -> dict[str, str]:
    """This process' environment for one that finds this repository's packages and has one thread; no GPU, unless `more` gives one."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | more


def run_python(*arguments: Any, seconds: float = 150, expect: int | None = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Call Python to its end; what it printed goes into the error where its exit code is not the expected one, if any is."""
    options = {"env": environment()} | options
    command = [sys.executable, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, **options)
    if expect is not None and ended.returncode != expect:
        raise AssertionError(f"{command[1:]} ended with {ended.returncode}, not {expect}\n{ended.stdout}{ended.stderr}")
    return ended


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def session(leader: int) -> list[int]:
    """Processes of a session that have not ended."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found
