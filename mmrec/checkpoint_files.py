"""The files in a run's checkpoint folder: their names, their order, and which of them can be gone on from."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mmrec.files import DamagedCheckpointError, read_checkpoint

LAST = "last.ckpt"  # a hard link of the newest copy
BEST = "best.ckpt"  # a hard link of the copy with the lowest validation loss
DAMAGED_SUFFIX = ".damaged"
_COPY = re.compile(r"step=(\d+)-loss=.*\.ckpt")
_BEST = re.compile(r"best-step=(\d+)-val_loss=(.*)\.ckpt")


def copy_name(step: int, loss: float) -> str:
    """The name of the checkpoint after `step` optimiser steps."""
    return f"step={step:06d}-loss={loss:.3f}.ckpt"


def copies(folder: Path) -> list[Path]:
    """Copies named by step and loss, the last written first; of two of one time the one of the higher step."""
    found: list[tuple[int, int, Path]] = []
    for path in folder.glob("step=*.ckpt"):
        if match := _COPY.fullmatch(path.name):
            try:
                found.append((path.stat().st_mtime_ns, int(match[1]), path))
            except FileNotFoundError:  # gone since it was listed
                continue
    return [path for _, _, path in sorted(found, reverse=True)]


class Best(NamedTuple):
    """The checkpoint with the lowest validation loss, as its name tells it.

    Attributes:
        step: optimiser steps taken.
        val_loss: nats a token, to six places.
    """

    path: Path
    step: int
    val_loss: float


def best_name(step: int, val_loss: float) -> str:
    """The name of the best checkpoint beside `best.ckpt`, which says what `best.ckpt` cannot."""
    return f"best-step={step:06d}-val_loss={val_loss:.6f}.ckpt"


def best_copies(folder: Path) -> list[Best]:
    """The best checkpoint first; of two, a run was killed before it removed the one that was the best before."""
    matches = [(path, _BEST.fullmatch(path.name)) for path in folder.glob("best-step=*.ckpt")]
    found = []
    for path, match in matches:
        try:
            if match is not None:
                found.append(Best(path, int(match[1]), float(match[2])))
        except ValueError:  # a name of somebody else's
            continue
    return sorted(found, key=lambda best: best.val_loss)


class Choice(NamedTuple):
    """The newest checkpoint that can be read.

    Attributes:
        path: None where the folder has none at all.
        damaged: those that are newer and cannot be.
        remark: one line that says why it is not `last.ckpt`; empty where it is.
    """

    path: Path | None
    damaged: Sequence[Path]
    remark: str


def newest_readable(folder: Path) -> Choice:
    """`last.ckpt`, or where it is damaged or gone the newest copy that is whole.

    Every byte of what is chosen has been read and compared with its checksum.

    Raises:
        DamagedCheckpointError: there are checkpoints, and none is whole; one line.
        ValueError: the newest holds objects that would have to run code: no accident, and nothing to pass over.
        PermissionError: no right to read one.
    """
    last = folder / LAST
    candidates = [last, *copies(folder)] if last.exists() else copies(folder)
    damaged: list[Path] = []
    faults: list[str] = [] if last.exists() or not candidates else [f"{last} is gone"]
    for path in candidates:
        try:
            if any(path.samefile(other) for other in damaged):  # another name of what has been refused
                damaged.append(path)
                continue
            read_checkpoint(path, mmap=True)
        except DamagedCheckpointError as error:
            damaged.append(path)
            faults.append(str(error).partition(";")[0])
        except FileNotFoundError:
            faults.append(f"{path} is gone")
        else:
            remark = f"{'; '.join(faults)}: using the one before, {path.name}" if faults else ""
            return Choice(path, damaged, remark)
    if not candidates:
        return Choice(None, [], "")
    best = first_whole(folder, damaged)
    other = f"give --ckpt_path {best}, which is whole" if best else "give one of another folder as --ckpt_path"
    raise DamagedCheckpointError(f"no checkpoint under {folder} can be read: {'; '.join(faults)}; {other}, or leave it out to begin anew")


def first_whole(folder: Path, damaged: Sequence[Path]) -> Path | None:
    """The first of `last.ckpt`, the copies from the newest on, and the best, every byte of which has been read; None where none is whole.

    Args:
        folder: of checkpoints.
        damaged: files that are known not to be whole, under whatever names.
    """
    for path in (folder / LAST, *copies(folder), folder / BEST, *(best.path for best in best_copies(folder))):
        try:
            if not any(path.samefile(other) for other in damaged if other.exists()):
                read_checkpoint(path, mmap=True)
                return path
        except (OSError, ValueError):  # gone, damaged, of another kind, or not to be read by this user
            continue
    return None


def require_whole(path: Path, folder: Path) -> None:
    """Raise DamagedCheckpointError, which names a whole one where one lies beside it, unless every byte of `path` can be gone on from.

    Args:
        path: a checkpoint that was chosen by name.
        folder: the run's checkpoints, of which `--ckpt_path last` takes one.
    """
    try:
        read_checkpoint(path, mmap=True)
    except DamagedCheckpointError as error:
        fault = str(error).partition(";")[0]
        other = first_whole(path.parent, [path]) or first_whole(folder, [path])
        if other is None:
            raise DamagedCheckpointError(f"{fault}; give one of another folder as --ckpt_path, none beside it is whole") from error
        if other in (folder / LAST, *copies(folder)):
            raise DamagedCheckpointError(f"{fault}; give --ckpt_path last, which takes {other}") from error
        raise DamagedCheckpointError(f"{fault}; give --ckpt_path {other}, which is whole") from error
