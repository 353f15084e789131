"""Snapshots of memory: PyTorch's viewer reads those of a GPU (https://docs.pytorch.org/memory_viz); a CPU's are JSON."""

import gc
import json
from pathlib import Path
from typing import Any

import torch

from mmrec.files import replacing, write_atomically

LARGEST_TENSORS = 50
HISTORY_ENTRIES = 200_000


def start_history() -> None:
    """Record every allocation with its Python stack from here on; on a CPU there is nothing to record."""
    if torch.cuda.is_available():
        torch.cuda.memory._record_memory_history(stacks="python", max_entries=HISTORY_ENTRIES)


def stop_history() -> None:
    """Stop recording and forget what was recorded."""
    if torch.cuda.is_available():
        torch.cuda.memory._record_memory_history(enabled=None)


def write_snapshot(folder: Path, name: str, on_gpu: bool, details: dict[str, Any]) -> Path:
    """Write `<name>.pickle` (GPU) or `<name>.json` (CPU: `details` and the largest tensors alive) into `folder`.

    Snapshots hold paths and stack traces: treat them as private, and unpickle nobody else's.
    """
    if on_gpu:
        path = folder / f"{name}.pickle"
        with replacing(path) as temporary:
            torch.cuda.memory._dump_snapshot(str(temporary))
        return path
    path = folder / f"{name}.json"
    write_atomically(path, (json.dumps({**details, "largest_tensors": largest_tensors()}, indent=1) + "\n").encode())
    return path


def largest_tensors() -> list[dict[str, Any]]:
    """The largest tensors that Python can reach: shape, dtype, device, bytes."""
    # type() and not isinstance(): the latter asks lazy proxies for their class, and wakes them. What a wrapper (of shards, of a compiler's
    # tracing, whose sizes may be symbols) holds, if anything, is found by itself.
    alive = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    alive.sort(key=lambda tensor: tensor.numel() * tensor.element_size(), reverse=True)
    return [
        {"shape": list(t.shape), "dtype": str(t.dtype), "device": str(t.device), "bytes": t.numel() * t.element_size()}
        for t in alive[:LARGEST_TENSORS]
    ]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: a GPU's, torch's on the CPU, or Python's own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
