"""The parser style of the scripts: argparse, no abbreviations, errors of one line; and the kinds of values that several of them take."""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mmrec.commandline.errors import fail
from mmrec.nearest import did_you_mean, nearest_name

_UNKNOWN = re.compile(r"unrecognized arguments: (?P<first>\S+)")


class PlainParser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line that names the option and the remedy, without the usage text; exit code 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2."""
        if match := _UNKNOWN.match(message):
            option = match["first"].partition("=")[0]
            names = [name[2:] for action in self._actions for name in action.option_strings if name.startswith("--")]
            nearest = nearest_name(option.lstrip("-"), names, cutoff=0.5) if option.startswith("--") else None
            fail(f"unknown option {option}{did_you_mean(nearest and f'--{nearest}') or '; --help lists them'}", None)
        fail(message.removeprefix("argument "), None)


def whole_number(text: str) -> int:
    """An option's whole number of at least 1."""
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return number


def seconds(text: str) -> float:
    """An option's time, above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return number


def output_file(text: str) -> Path:
    """A file to write, whose folder must be there already: what was measured for an hour would have nowhere to go."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"no folder {path.parent}; make it first, or name a file elsewhere")
    return path


def command_line(program: str, arguments: Sequence[str] | None) -> str:
    """The command that was given, for the rows that it writes: of absolute paths, which are one machine's, the last part.

    Args:
        program: how it is called, `python -m …`.
        arguments: what follows; None: `sys.argv`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    return shlex.join([*program.split(), *(Path(word).name if word.startswith("/") else word for word in given)])
