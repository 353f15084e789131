"""The parser style of the scripts: argparse, no abbreviations, errors of one line."""

import argparse
import re
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
