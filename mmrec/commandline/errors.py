"""What a user did wrong ends in one line and exit code 2; what this code did wrong keeps its traceback."""

import dis
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import NoReturn

from mmrec.commandline.parse_errors import one_line

OUR_PACKAGES = ("mmrec", "lightning_modules", "datamodules", "callbacks")
BAD_INPUT = 2  # exit code


class BadInputError(ValueError):
    """A fault in what the user gave; its message is one line that names the thing and the remedy."""


def fail(message: str) -> NoReturn:
    """Print `error: MESSAGE` on one line of the standard error and leave with exit code 2."""
    sys.stdout.flush()
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
        fail(message)


def bad_input_message(error: Exception) -> str | None:
    """The line for an exception that bad input caused, None for any other.

    Bad input is what a `raise` statement in our packages calls a ValueError or an OSError, an OSError that names a file,
    and what Lightning calls a misconfiguration. A ValueError out of torch or out of an expression is a bug and is not.
    """
    if isinstance(error, BadInputError) or type(error).__name__ == "MisconfigurationException":
        return one_line(str(error))
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {(error.strerror or type(error).__name__).lower()}"
    if not isinstance(error, ValueError | OSError):
        return None
    if worker := _worker_message(error):
        return worker
    frame, instruction = _innermost(error.__traceback__)
    if frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in OUR_PACKAGES and _raises(frame, instruction):
        return str(error)
    return None


def _innermost(traceback: TracebackType | None) -> tuple[FrameType | None, int]:
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return (traceback.tb_frame, traceback.tb_lasti) if traceback is not None else (None, 0)


def _raises(frame: FrameType, offset: int) -> bool:
    """Whether the instruction at `offset` of the frame's code is a raise statement's."""
    return any(found.offset == offset and found.opname == "RAISE_VARARGS" for found in dis.get_instructions(frame.f_code))


def _worker_message(error: Exception) -> str | None:
    """The message of our own error that torch brought back from a data worker together with its traceback as text."""
    text = str(error)
    if not text.startswith("Caught ") or "DataLoader worker process" not in text:
        return None
    files = re.findall(r'^  File "([^"]+)", line \d+', text, re.MULTILINE)
    ours = re.search(rf"[/\\](?:{'|'.join(OUR_PACKAGES)})[/\\][^/\\]", files[-1]) if files else None
    source = re.findall(r"^    (.*)$", text, re.MULTILINE)
    if not ours or not any(line.strip().startswith("raise ") for line in source[-2:]):
        return None
    return text.strip().splitlines()[-1].partition(": ")[2]
