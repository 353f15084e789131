"""HostCopy: a state copied to host memory that is made once and kept for the next."""

import copy
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes: of any dtype, and of a cache line
_PORTABLE = 1  # cudaHostRegisterPortable


class HostCopy:
    """Copies nested containers with tensors in them into one region of host memory, page-locked where there is a GPU.

    A tensor's whole storage is copied, as `torch.save` writes it, and once however many tensors share it: what is copied is written to
    the same file. Everything that is no plain tensor goes through `copy.deepcopy`.

    Not torch's DefaultStager, which does the same for distributed checkpoints: it locks each tensor's memory by itself, the small and
    short-lived ones anew at every copy, and has the host wait for the whole device.
    """

    def __init__(self) -> None:
        self._region: mmap.mmap | None = None
        self._locked = False

    def take(self, state: Any) -> tuple[Any, Callable[[], None]]:
        """Copy `state` as it is when what has been launched on the current streams is done; returns before the GPU has got there.

        The copy before this one is overwritten: nobody may read it any more.

        Returns:
            The copy, all of it on the CPU, and what to call before it is read, from any thread: it waits for the GPU's copying alone.

        Raises:
            OSError, RuntimeError, MemoryError: there is not enough memory.
        """
        tensors = {id(tensor): tensor for tensor in _plain_tensors(state)}
        sources = {_key(tensor): tensor.untyped_storage() for tensor in tensors.values()}
        region = self._of_size(sum(_rounded(storage.nbytes()) for storage in sources.values()))
        copies, offset = {}, 0
        for key, storage in sources.items():
            size = storage.nbytes()
            # A storage of its own, so that each is written by itself.
            bytes_ = torch.frombuffer(region, dtype=torch.uint8, count=size, offset=offset) if size else torch.empty(0, dtype=torch.uint8)
            bytes_.copy_(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage), non_blocking=True)
            copies[key] = bytes_.untyped_storage()
            offset += _rounded(size)
        known = {
            number: torch.empty(0, dtype=tensor.dtype).set_(copies[_key(tensor)], tensor.storage_offset(), tensor.size(), tensor.stride())
            for number, tensor in tensors.items()
        }
        events = [
            torch.cuda.current_stream(device).record_event()
            for device in {storage.device for storage in sources.values()}
            if device.type == "cuda"
        ]

        def ready() -> None:
            for event in events:
                event.synchronize()

        return copy.deepcopy(state, known), ready

    def close(self) -> None:
        """Give the memory back, once nobody reads the last copy any more."""
        if self._region is not None and self._locked:
            torch.cuda.cudart().cudaHostUnregister(_address(self._region))
        self._region, self._locked = None, False

    def _of_size(self, size: int) -> mmap.mmap:
        if self._region is None or len(self._region) < size:
            self.close()
            # Shared with forked processes, as it is by default: a private page that a data worker was forked with would be copied when
            # it is written next, and the GPU would go on writing to the old one.
            self._region = mmap.mmap(-1, max(size, 1))
            if torch.cuda.is_available():
                # Where it cannot be locked, copying is slower and as right: the driver then waits for each.
                error = torch.cuda.cudart().cudaHostRegister(_address(self._region), len(self._region), _PORTABLE)
                self._locked = int(error) == 0
        return self._region


def _plain_tensors(value: Any) -> Iterator[Tensor]:
    if type(value) is Tensor and value.layout is torch.strided and not (value.requires_grad or value.is_conj() or value.is_neg()):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _plain_tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _plain_tensors(item)


def _key(tensor: Tensor) -> tuple[torch.device, int, int]:
    storage = tensor.untyped_storage()
    return storage.device, storage.data_ptr(), storage.nbytes()


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _address(region: mmap.mmap) -> int:
    return torch.frombuffer(region, dtype=torch.uint8).data_ptr()
