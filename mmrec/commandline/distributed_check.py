"""Whether all processes of a job reach each other: an all-reduce whose result is compared and whose speed is measured."""

import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy

from mmrec.commandline.errors import BadInputError
from mmrec.ranks import gathered

PATIENCE = timedelta(minutes=5)  # for a process that does not come; the first on a cold file system imports for minutes
GPU_BYTES, CPU_BYTES = 256 * 2**20, 8 * 2**20
WARM_UP, REPEATS = 3, 10


@dataclass(frozen=True)
class RankReport:
    """What one rank saw.

    Attributes:
        rank, host, device: which it is.
        wrong: elements of the sum that are not what they should be.
        bus_bandwidth: GB/s each rank sent and received, for W ranks 2 (W − 1) / W · bytes / time, as NCCL's tests count it; 0 for W = 1.
    """

    rank: int
    host: str
    device: str
    wrong: int
    bus_bandwidth: float


def processes_here() -> int | None:
    """Processes of this job on this machine, as srun or torchrun says; None where neither started this one."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    if "SLURM_NTASKS_PER_NODE" in os.environ and "SLURM_PROCID" in os.environ:
        return int(os.environ["SLURM_NTASKS_PER_NODE"])
    return None


def machines() -> int:
    """Machines of this job, as srun or torchrun says."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])
    return int(os.environ.get("SLURM_NNODES", "1")) if processes_here() else 1


def start(processes: int | None) -> Fabric:
    """Join the other processes as a training would: NCCL with a GPU for each, else gloo.

    Args:
        processes: on this machine; None: as the launcher says, else one a GPU.

    Raises:
        BadInputError: too few GPUs.
    """
    count = processes or processes_here() or max(torch.cuda.device_count(), 1)
    on_gpu = torch.cuda.is_available()
    if on_gpu and count > torch.cuda.device_count():
        raise BadInputError(f"doctor: {count} processes on this machine and {torch.cuda.device_count()} GPUs; start one a GPU")
    strategy = DDPStrategy(timeout=PATIENCE)
    fabric = Fabric(accelerator="cuda" if on_gpu else "cpu", devices=count, num_nodes=machines(), strategy=strategy)
    fabric.launch()
    return fabric


def measure(fabric: Fabric) -> list[RankReport]:
    """Add up a tensor of every rank, and time it; the reports of all ranks in their order, on every rank."""
    on_gpu, world = fabric.device.type == "cuda", fabric.world_size
    numbers = torch.arange((GPU_BYTES if on_gpu else CPU_BYTES) // 4, dtype=torch.int32, device=fabric.device) % 1024
    # Whole numbers that fp32 holds exactly, another one in each place and on each rank: what is lost, doubled or swapped shows.
    own = (numbers + fabric.global_rank).float()
    expected = (numbers * world + world * (world - 1) // 2).float()
    total = own.clone()
    torch.distributed.all_reduce(total)
    wrong = int((total != expected).sum())
    for _ in range(WARM_UP):
        torch.distributed.all_reduce(total)
    fabric.barrier()
    _wait(on_gpu)
    began = time.perf_counter()
    for _ in range(REPEATS):
        torch.distributed.all_reduce(total)
    _wait(on_gpu)
    seconds = (time.perf_counter() - began) / REPEATS
    bandwidth = 2 * (world - 1) / world * total.numel() * total.element_size() / seconds / 1e9
    device = torch.cuda.get_device_name(fabric.device) if on_gpu else "CPU"
    reports = gathered(RankReport(fabric.global_rank, socket.gethostname(), device, wrong, bandwidth))
    torch.distributed.destroy_process_group()
    return reports


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def faults(reports: list[RankReport], minimum: float | None) -> list[str]:
    """What is wrong, a line each, the worst first.

    Args:
        reports: of all ranks.
        minimum: GB/s that the slowest rank must have; None: none.
    """
    wrong = [f"rank {report.rank} on {report.host} ({report.wrong:,} elements)" for report in reports if report.wrong]
    found = [f"the sum over all ranks is wrong at {', '.join(wrong)}; take that machine, or its GPU, out of the job"] if wrong else []
    slowest = min(reports, key=lambda report: report.bus_bandwidth)
    if minimum is not None and len(reports) > 1 and slowest.bus_bandwidth < minimum:
        remedy = "compare the hosts above, and see with NCCL_DEBUG=INFO which network is taken"
        found.append(f"the all-reduce runs at {slowest.bus_bandwidth:.2f} GB/s, below {minimum:g}; {remedy}")
    return found


def lines(reports: list[RankReport]) -> list[str]:
    """The reports as text, one rank a line; of one rank alone also that it has tested nothing."""
    width = max(len(report.host) for report in reports)
    alone = len(reports) == 1
    found = [
        f"rank {report.rank:3d}  {report.host:{width}}  {report.device}  sum {'wrong' if report.wrong else 'right'}"
        + ("" if alone else f"  bus bandwidth {report.bus_bandwidth:.2f} GB/s")
        for report in reports
    ]
    if alone:
        found.append(
            "nothing was tested: one process sends nothing to another; give --processes N for several on this machine, or start doctor "
            "by srun or torchrun for several machines"
        )
    return found
