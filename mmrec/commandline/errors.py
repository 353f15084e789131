"""What a user did wrong ends in one line and exit code 2; what this code did wrong keeps its traceback.

With MMREC_TRACEBACK=1 in the environment the traceback of any error is printed as well.
"""

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
TRACEBACK_VARIABLE = "MMREC_TRACEBACK"


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

    Bad input is a ValueError or an OSError whose innermost frame lies in our packages, an OSError that names a file, what Lightning
    calls a misconfiguration, and a package that it says is missing. A ValueError out of torch or another library is a bug and is not.
    """
    if isinstance(error, BadInputError) or type(error).__name__ == "MisconfigurationException":
        return one_line(str(error))
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {(error.strerror or type(error).__name__).lower()}"
    if isinstance(error, ModuleNotFoundError) and error.name is None:  # raised by hand: what was asked for needs a further package
        return one_line(str(error))
    if not isinstance(error, ValueError | OSError):
        return None
    if str(error).startswith("Caught ") and "DataLoader worker process" in str(error):
        return _worker_message(str(error))
    frames = traceback.extract_tb(error.__traceback__)
    return str(error) if frames and _is_ours(frames[-1].filename) else None


def _is_ours(file: str) -> bool:
    """Whether a source file belongs to our packages, wherever they are installed."""
    root = Path(__file__).parents[2]
    return any(Path(file).is_relative_to(root / package) for package in OUR_PACKAGES)


def _worker_message(text: str) -> str | None:
    """The message of an error of ours in a data worker: torch brings it back with the worker's traceback as its text."""
    files = re.findall(r'^  File "([^"]+)", line \d+', text, re.MULTILINE)
    return text.strip().splitlines()[-1].partition(": ")[2] if files and _is_ours(files[-1]) else None
