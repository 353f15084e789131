"""Memory in use now and at its peak, on a GPU and on a CPU, and how it divides into categories. All in bytes."""

import resource
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

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


def storages(tensors: Iterable[Tensor | None]) -> dict[int, int]:
    """Bytes of the distinct storages behind `tensors`, by address; of a sharded tensor its local part."""
    found: dict[int, int] = {}
    for tensor in tensors:
        if tensor is not None:
            storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    found.pop(0, None)  # nothing allocated
    return found


def category_bytes(module: nn.Module, optimizers: Iterable[Optimizer]) -> dict[str, int]:
    """Bytes of parameters, buffers, gradients and optimiser state, each storage once."""
    parameters = list(module.parameters())
    categories = {
        "parameters": storages(parameters),
        "buffers": storages(module.buffers()),
        "gradients": storages(parameter.grad for parameter in parameters),
        "optimizer state": storages(_state_tensors(optimizers)),
    }
    return {name: sum(found.values()) for name, found in categories.items()}


def _state_tensors(optimizers: Iterable[Optimizer]) -> Iterator[Tensor]:
    for optimizer in optimizers:
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


class SavedActivations:
    """Bytes that a forward keeps for its backward, counted tensor by tensor: what a CPU has instead of an allocator's counter."""

    def __init__(self, module: nn.Module) -> None:
        self._excluded = storages([*module.parameters(), *module.buffers()]).keys()
        self._found: dict[int, int] = {}
        self._hooks: Any = None

    def start(self) -> None:
        """Count from here."""
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()

    def stop(self) -> int:
        """Stop counting; the bytes of distinct storages, parameters and buffers left out. 0 if it was not started."""
        if self._hooks is not None:
            self._hooks.__exit__(None, None, None)
            self._hooks = None
        return sum(nbytes for address, nbytes in self._found.items() if address not in self._excluded)

    def _pack(self, tensor: Tensor) -> Tensor:
        self._found |= storages([tensor])
        return tensor


def markdown_table(categories: dict[str, int], title: str) -> str:
    """A table of MiB and shares, which TensorBoard renders and a terminal can read."""
    total = sum(categories.values())
    rows = [f"{title}", "", "| category | MiB | share |", "| :--- | ---: | ---: |"]
    rows += [f"| {name} | {size / MIB:,.2f} | {size / max(total, 1):.1%} |" for name, size in categories.items()]
    rows.append(f"| sum | {total / MIB:,.2f} | {1:.1%} |")
    return "\n".join(rows)
