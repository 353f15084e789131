"""AtomicCheckpointIO: a checkpoint is either there and whole, or not there."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mmrec.files import read_checkpoint, replacing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to the disk, renames, and flushes the folder: a kill at any moment leaves the old file or the new.

    Lightning's own way collects the bytes in memory, stages them in the temporary folder, and copies where that lies on another
    filesystem: a kill during the copy leaves a truncated file under the final name (PL#21253). Local paths only.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            OSError: in one line, where there is no room or no right to write; what was there before is untouched.
        """
        if storage_options is not None:
            raise TypeError("AtomicCheckpointIO takes no storage_options")
        target = Path(path)
        needed = _bytes_to_write(checkpoint)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if needed > shutil.disk_usage(target.parent).free:
                raise OSError("no space left on the disk")
            with replacing(target) as temporary, open(temporary, "wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch.save turns a failed write into a RuntimeError of its zip writer
            cause = _os_error(error)
            if cause is None:
                raise
            raise OSError(f"cannot write the checkpoint {target}: {_reason(cause, target, needed)}") from error

    def then(self, action: Callable[[], None]) -> None:
        """Do something as soon as the file of the latest `save_checkpoint` is there: here at once."""
        action()

    def wait(self) -> None:
        """Until nothing is being written: here nothing ever is."""

    def load_checkpoint(self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Map the file into memory; the strategy copies the parts to where they belong.

        The ranks of a machine share the pages: of eight that read it into memory of their own each would hold all of it. Never runs what a
        file holds, whatever `weights_only` says.

        Raises:
            FileNotFoundError, ValueError: in one line, see `read_checkpoint`.
        """
        return read_checkpoint(path, mmap=True, map_location=map_location)


def _bytes_to_write(checkpoint: Any) -> int:
    """Bytes of the tensors in the file: `torch.save` writes the whole storage of each, and once however many tensors share it."""
    storages = (tensor.untyped_storage() for tensor in _tensors(checkpoint))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All with a storage of their own; of a tensor made of others, such as torchao's of 8 bits, those."""
    if isinstance(value, torch.Tensor):
        if is_traceable_wrapper_subclass(value):
            for name in value.__tensor_flatten__()[0]:
                yield from _tensors(getattr(value, name))
        elif value.layout is torch.strided and not value.is_meta:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError behind an error, if there is one."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _reason(cause: OSError, target: Path, needed: int) -> str:
    reason = cause.strerror or str(cause)
    if isinstance(cause, PermissionError):
        return f"{reason}; give a folder you may write to"
    folder = next((folder for folder in target.parents if folder.is_dir()), Path("/"))
    free = shutil.disk_usage(folder).free
    return f"{reason}; it needs about {needed / 2**20:,.1f} MiB and {free / 2**20:,.1f} MiB are free; make room"
