"""Memory in use now and at its peak, on a GPU and on a CPU. All in bytes."""

import resource
from typing import Protocol

import torch

MIB = 2**20


class MemoryMeter(Protocol):
    """Reads memory by the names its device has for it."""

    def reset_peak(self) -> None:
        """Start a new peak at what is in use now."""

    def read(self) -> dict[str, float]:
        """Bytes by name; `peak` is the largest since `reset_peak`."""


class CudaMemoryMeter:
    """The caching allocator's counters of one device; reading them does not wait for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset_peak(self) -> None:
        """Start a new peak."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def read(self) -> dict[str, float]:
        """`allocated` by tensors, `reserved` from the driver, `peak` of allocated."""
        return {
            "allocated": torch.cuda.memory_allocated(self.device),
            "reserved": torch.cuda.memory_reserved(self.device),
            "peak": torch.cuda.max_memory_allocated(self.device),
        }


class ProcessMemoryMeter:
    """The process's resident set, from /proc where there is one (Linux), else `getrusage`'s peak."""

    def reset_peak(self) -> None:
        """Start a new peak; where the kernel does not allow it, the peak is that of the process's life."""
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except OSError:
            return

    def read(self) -> dict[str, float]:
        """`rss` now and its `peak`."""
        try:
            with open("/proc/self/status") as file:
                fields = dict(line.split(":", 1) for line in file if line.startswith(("VmRSS", "VmHWM")))
            return {"rss": float(fields["VmRSS"].split()[0]) * 1024, "peak": float(fields["VmHWM"].split()[0]) * 1024}
        except (OSError, KeyError):
            peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024
            return {"rss": peak, "peak": peak}
