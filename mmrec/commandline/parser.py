"""The parser style of every command: jsonargparse, no abbreviations, errors of one line."""

from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from mmrec.commandline.errors import fail
from mmrec.commandline.parse_errors import one_line

PROGRAM = "python -m mmrec.cli"


class OneLineErrors(ArgumentParser):
    """A jsonargparse parser whose errors are one line, without the usage text, and which takes no prefix for an option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Leave with exit code 2 and one line; a parser within a parser, which reads a class's arguments, tells the outer one."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = self._chosen_parser(ex)
        fail(one_line(message, known_keys(parser), parser.known_classes()), ex)

    def known_classes(self) -> dict[str, list[str]]:
        """Names of the classes that may be given without their package, by the key that takes them."""
        return {}

    def _chosen_parser(self, error: Exception | None) -> "OneLineErrors":
        """The subcommand's parser that an error is about, this one where there is none."""
        chosen = getattr(error, "subcommand_parser", None)
        if chosen is None and self._subcommands_action is not None:
            parsers = self._subcommands_action.choices
            chosen = next((parsers[argument] for argument in getattr(self, "args", []) if argument in parsers), None)
        return chosen or self


def known_keys(parser: ArgumentParser) -> list[str]:
    """Dotted keys that a parser accepts."""
    return [option.lstrip("-") for action in parser._actions for option in action.option_strings if option.startswith("--")]
