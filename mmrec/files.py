"""Files that are there wholly or not at all, folders that can be written, and checkpoints read without running what they hold.

Imports nothing but torch, so that the data modules and the callbacks may use it too.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

TEMPORARY_SUFFIX = ".tmp"


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Flush a folder's entries to the disk, so that a rename survives a power cut."""
    _sync(folder)


def _sync(path: str | os.PathLike[str]) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path` to write; at the end flush it to the disk and rename it to `path` in one step.

    A kill at any moment leaves the old file or the new; after an error nothing of the new one stays. Of two writers the last wins whole.
    The folder is made where there is none. An OSError that names no file names `path`.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    temporary.unlink(missing_ok=True)  # of a killed process with the same number; it may be a hard link of a good file
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a write that a full disk breaks off does not say of what
            error.filename = str(target)
        raise
    finally:
        # Also where all went well: renaming onto a hard link of the same file does nothing, and leaves the temporary name.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_folder(target.parent)


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` by `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source` in one step, without a second copy on the disk where the filesystem has hard links."""
    with replacing(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:  # no hard links here
            shutil.copyfile(source, temporary)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left half-written in `folder`; for where no other one writes."""
    for leftover in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        leftover.unlink(missing_ok=True)


def require_writable(folder: str | os.PathLike[str], name: str) -> None:
    """Raise a one-line error unless `folder`, or the nearest parent that exists, can be written; nothing stays there.

    Args:
        folder: where files shall be written.
        name: what the user calls it.

    Raises:
        NotADirectoryError: a file stands in the way.
        PermissionError: no right to write there, or a read-only file system.
        OSError: it cannot be written for another reason (a full disk).
    """
    place = next(parent for parent in (Path(folder), *Path(folder).absolute().parents) if parent.exists())
    fault = f"{name} {folder} cannot be written"
    if not place.is_dir():
        raise NotADirectoryError(f"{fault}: {place} is a file; choose another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        why = "read-only file system" if os.statvfs(place).f_flag & os.ST_RDONLY else f"no permission in {place}"
        raise PermissionError(f"{fault}: {why}; choose another folder")
    try:  # permission bits do not tell all
        with TemporaryDirectory(dir=place, prefix=".mmrec-"):
            pass
    except OSError as error:
        raise OSError(f"{fault}: {(error.strerror or str(error)).lower()}; choose another folder") from error


class DamagedCheckpointError(ValueError):
    """A file that is no whole checkpoint: another one may be."""


def read_checkpoint(path: str | os.PathLike[str], *, mmap: bool = False, map_location: Any = "cpu") -> Any:
    """A checkpoint's content: tensors and plain types, its checksums compared.

    The checksums are the CRC-32s that `torch.save` keeps of every record of its zip file. They lie in the file that they speak of and are
    renamed into place with it, so that no kill can part the two, as it could a file beside it. `torch.load` itself compares none of them.

    Args:
        path: a file that `torch.save` wrote.
        mmap: map the tensors from the file and read them when they are used.
        map_location: as `torch.load`'s.

    Raises:
        FileNotFoundError: no such file.
        PermissionError: no right to read it.
        DamagedCheckpointError: a file that is damaged, or no checkpoint; a ValueError.
        ValueError: it holds objects that would have to run code to be loaded.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint {path}; give the path of a .ckpt file, or 'last'")
    status = os.stat(path)
    fault = _fault(os.path.realpath(path), status.st_size, status.st_mtime_ns)
    if fault is None:
        try:
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            raise ValueError(f"checkpoint {path} is refused: it holds more than tensors and plain types") from error
        except (RuntimeError, EOFError, KeyError) as error:
            fault = (str(error).splitlines() or [type(error).__name__])[0]
    raise DamagedCheckpointError(f"checkpoint {path} is damaged or no checkpoint ({fault}); use another one, there may be one beside it")


@functools.lru_cache(maxsize=64)
def _fault(path: str, size: int, changed: int) -> str | None:
    """What is wrong with the file as such.

    Asked once about a file of this size and time of change: before a large run starts, its checkpoint is read more than once.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return "its checksums do not fit its bytes" if archive.testzip() is not None else None
    except zipfile.BadZipFile:
        return "truncated, or another kind of file"
    except OSError as error:
        if error.errno not in (None, errno.EIO, errno.EINVAL):
            raise
        return (error.strerror or "its directory leads outside of it").lower()  # a bad sector; an offset that is no place in the file
    except Exception as error:  # a directory that says nonsense: a name that is no text, an unknown compression, an end before the end
        return f"its directory is not a zip file's: {type(error).__name__}"
