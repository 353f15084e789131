"""How memory divides into categories, in bytes, and a table of it."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from callbacks.shards import local_part
from mmrec.measuring.meters import MIB


def storages(tensors: Iterable[Tensor | None]) -> dict[int, int]:
    """Bytes of the distinct storages behind `tensors`, by address; of a sharded tensor its local part, of a quantised one its parts."""
    found: dict[int, int] = {}
    for tensor in tensors:
        if tensor is None:
            continue
        if isinstance(tensor, DTensor):
            found |= storages([local_part(tensor)])
        elif is_traceable_wrapper_subclass(tensor):
            found |= storages(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        else:
            storage = tensor.untyped_storage()
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
