"""AtomicCheckpointIO: a checkpoint is either there and whole, or not there."""

import contextlib
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

TEMPORARY_SUFFIX = ".writing"


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
        temporary = target.with_name(f".{target.name}{TEMPORARY_SUFFIX}")
        needed = sum(_tensor_bytes(checkpoint))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if needed > shutil.disk_usage(target.parent).free:
                raise OSError("no space left on the disk")
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            sync_folder(target.parent)
        except (OSError, RuntimeError) as error:  # torch.save turns a failed write into a RuntimeError of its zip writer
            with contextlib.suppress(OSError):  # where there is no folder there is nothing to clear either
                temporary.unlink(missing_ok=True)
            cause = _os_error(error)
            if cause is None:
                raise
            raise OSError(f"cannot write the checkpoint {target}: {_reason(cause, target, needed)}") from error

    def load_checkpoint(self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Load onto the CPU; the strategy moves the parts to where they belong.

        Raises:
            FileNotFoundError: where there is no such file.
            ValueError: in one line, where the file is truncated or no checkpoint.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no checkpoint {path}; give the path of a .ckpt file, or 'last'")
        remedy = "resume from another one beside it"
        if fault := _fault(path):
            raise ValueError(f"the checkpoint {path} cannot be read ({fault}); {remedy}")
        try:
            return super().load_checkpoint(path, map_location=map_location, weights_only=weights_only)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            first_line = (str(error).splitlines() or ["unreadable"])[0]
            raise ValueError(f"the checkpoint {path} cannot be read ({first_line}); {remedy}") from error


def _fault(path: str | os.PathLike[str]) -> str | None:
    """What is wrong with the file as such; torch.load itself does not compare the checksums that torch.save wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "its checksums do not fit its bytes" if archive.testzip() is not None else None
    except zipfile.BadZipFile:
        return "truncated, or no checkpoint"


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source` in one step, without a second copy on the disk where the filesystem has hard links."""
    temporary = target.with_name(f".{target.name}{TEMPORARY_SUFFIX}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # no hard links here
        shutil.copyfile(source, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
    os.replace(temporary, target)
    # Renaming onto a hard link of the same file does nothing, and leaves the temporary name.
    temporary.unlink(missing_ok=True)
    sync_folder(target.parent)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed runs left half-written in `folder`."""
    for leftover in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        leftover.unlink(missing_ok=True)


def _tensor_bytes(value: Any) -> Iterator[int]:
    if isinstance(value, torch.Tensor):
        yield value.numel() * value.element_size()
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensor_bytes(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensor_bytes(item)


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
    return f"{reason}; it needs about {needed / 2**20:,.1f} MiB and {free / 2**20:,.1f} MiB are free; make room and resume"
