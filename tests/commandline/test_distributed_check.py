"""`doctor --distributed`: the processes of a job add up a tensor; a wrong sum, a slow network, a missing process are told."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import CommandLine
from processes import run_python

from mmrec.commandline import distributed_check
from mmrec.commandline.distributed_check import RankReport, faults, lines, machines, processes_here
from mmrec.commandline.errors import BadInputError

GOOD = [RankReport(0, "n1", "CPU", 0, 1.5), RankReport(1, "node-2", "CPU", 0, 1.25)]


def test_two_processes(tmp_path: Path) -> None:
    done = run_python("-m", "mmrec.cli", "doctor", "--distributed", "--processes", "2", seconds=250)
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["rank", "0"], ["rank", "1"]]
    assert all("sum right" in line and "GB/s" in line for line in done.stdout.splitlines())


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small, and by no launcher."""
    for name in ("LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS_PER_NODE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(distributed_check, "CPU_BYTES", 4096)


def test_a_wrong_sum_fails_in_one_line(alone: None, cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.distributed.all_reduce

    def flipping(tensor: torch.Tensor, *arguments: Any) -> Any:
        work = real(tensor, *arguments)
        tensor[17] += 1
        return work

    monkeypatch.setattr(torch.distributed, "all_reduce", flipping)
    result = cli("doctor", "--distributed", "--processes", "1")
    assert result.code == 1
    (error,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: the sum over all ranks is wrong at rank 0 on ")
    assert "(1 elements); take that machine, or its GPU, out of the job" in error
    assert "sum wrong" in result.out


def test_processes_that_do_not_meet_fail_in_one_line(alone: None, cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(processes: int | None) -> Any:
        raise torch.distributed.DistStoreError("Timed out after 301 seconds\nwaiting for clients. 1/2 clients joined.")

    monkeypatch.setattr(distributed_check, "start", nobody)
    result = cli("doctor", "--distributed")
    assert result.code == 1
    assert result.err == (
        "error: the processes do not reach each other: Timed out after 301 seconds waiting for clients. 1/2 clients joined.\n"
    )


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BadInputError, match="2 processes on this machine and 1 GPUs; start one a GPU"):
        distributed_check.start(2)


def test_faults() -> None:
    assert faults(GOOD, None) == faults(GOOD, 1.25) == []
    assert faults(GOOD[:1], 100.0) == []  # one process sends nothing
    (slow,) = faults(GOOD, 10.0)
    assert slow.startswith("the all-reduce runs at 1.25 GB/s, below 10; ")
    wrong, _ = faults([*GOOD, RankReport(2, "n3", "CPU", 1200, 1.0)], 10.0)
    assert wrong.startswith("the sum over all ranks is wrong at rank 2 on n3 (1,200 elements); ")


def test_lines() -> None:
    assert lines(GOOD) == [
        "rank   0  n1      CPU  sum right  bus bandwidth 1.50 GB/s",
        "rank   1  node-2  CPU  sum right  bus bandwidth 1.25 GB/s",
    ]
    alone, remark = lines([RankReport(0, "n1", "CPU", 0, 0.0)])
    assert alone == "rank   0  n1  CPU  sum right"
    assert remark.startswith("nothing was tested: one process sends nothing to another; give --processes N ")
    assert "srun" in remark


@pytest.mark.parametrize(
    ("environment", "here", "count"),
    [
        ({}, None, 1),
        ({"SLURM_NTASKS_PER_NODE": "8", "SLURM_NNODES": "4", "SLURM_PROCID": "0"}, 8, 4),
        ({"SLURM_NTASKS_PER_NODE": "8", "SLURM_NNODES": "4"}, None, 1),  # in the job's script, not by srun
        ({"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "6"}, 2, 3),
    ],
)
def test_launchers(alone: None, environment: dict[str, str], here: int | None, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (processes_here(), machines()) == (here, count)
