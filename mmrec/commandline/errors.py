"""What a user did wrong ends in one line and exit code 2; what this code did wrong keeps its traceback.

With MMREC_TRACEBACK=1 in the environment the traceback of any error is printed as well.
"""

import errno
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from mmrec.commandline.parse_errors import one_line

OUR_PACKAGES = ("mmrec", "lightning_modules", "datamodules", "callbacks")
BAD_INPUT = 2  # exit code
_ELSEWHERE = "choose another folder (trainer.default_root_dir, data.cache_dir, --output; TMPDIR is that of temporary files)"
_DISK_REMEDIES = {  # faults of a disk, which whatever writes may meet
    errno.ENOSPC: f"free some space (df shows which disk is full), or {_ELSEWHERE}",
    errno.EDQUOT: f"delete files of yours, ask for a larger quota, or {_ELSEWHERE}",
    errno.EROFS: _ELSEWHERE,
}
TRACEBACK_VARIABLE = "MMREC_TRACEBACK"
_ERROR_NUMBER = re.compile(r"\(os error (\d+)\)\s*$|^(?:OSError: )?\[Errno (\d+)\][^\n]*\s*\Z", re.MULTILINE)


class BadInputError(ValueError):
    """A fault in what the user gave; its message is one line that names the thing and the remedy."""


def fail(message: str, error: BaseException | None) -> NoReturn:
    """Print `error: MESSAGE` on one line of the standard error and leave with exit code 2; before it, if asked for, the traceback."""
    sys.stdout.flush()
    if error is not None and os.environ.get(TRACEBACK_VARIABLE) == "1":
        traceback.print_exception(error)
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    raise SystemExit(BAD_INPUT)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn bad input, raised anywhere within, into its one line. Other exceptions pass."""
    try:
        yield
    except BrokenPipeError:  # `… | head`: the reader has gone, which is no fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except Exception as error:
        message = bad_input_message(error)
        if message is None:
            raise
        fail(message, error)


def bad_input_message(error: Exception) -> str | None:
    """The line for an exception that bad input caused, None for any other.

    Bad input is a ValueError or an OSError whose innermost frame lies in our packages, an OSError that names a file, a disk that is full or
    read-only wherever that is found out, what Lightning calls a misconfiguration, and a package that it says is missing. A ValueError out
    of torch or another library is a bug and is not.
    """
    if isinstance(error, BadInputError) or type(error).__name__ == "MisconfigurationException":
        return one_line(str(error))
    if (fault := _disk_fault(error)) is not None:
        return fault
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {(error.strerror or type(error).__name__).lower()}"
    if isinstance(error, ModuleNotFoundError) and error.name is None:  # raised by hand: what was asked for needs a further package
        return one_line(str(error))
    if not isinstance(error, ValueError | OSError):
        return None
    if str(error).startswith("Caught ") and "DataLoader worker process" in str(error):
        return _worker_message(str(error))
    return str(error) if _raised_by_us(error) else None


def _disk_fault(error: Exception) -> str | None:
    """The line for a disk that is full or read-only. Python's errors hold the number, Rust's and a data worker's have it in their text."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and not _raised_by_us(error) and (found := _ERROR_NUMBER.search(str(error))):
        number = int(found[1] or found[2])
    if number not in _DISK_REMEDIES:
        return None
    filename = error.filename if isinstance(error, OSError) else None
    return f"{f'{filename}: ' if filename is not None else ''}{os.strerror(number).lower()}; {_DISK_REMEDIES[number]}"


def _raised_by_us(error: Exception) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and _is_ours(frames[-1].filename)


def _is_ours(file: str) -> bool:
    """Whether a source file belongs to our packages, wherever they are installed."""
    root = Path(__file__).parents[2]
    return any(Path(file).is_relative_to(root / package) for package in OUR_PACKAGES)


def _worker_message(text: str) -> str | None:
    """The message of an error of ours in a data worker: torch brings it back with the worker's traceback as its text."""
    files = re.findall(r'^  File "([^"]+)", line \d+', text, re.MULTILINE)
    return text.strip().splitlines()[-1].partition(": ")[2] if files and _is_ours(files[-1]) else None
