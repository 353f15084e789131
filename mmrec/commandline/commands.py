"""The list of commands: Lightning's four, and ours with the modules that run them."""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple

from mmrec.commandline.parser import OneLineErrors
from mmrec.nearest import did_you_mean, nearest_name


class Command(NamedTuple):
    """A command of our own; its module is imported when it is needed and not before.

    Attributes:
        module: where `build_parser()` and `run(arguments)` are.
    """

    module: str

    def build_parser(self) -> OneLineErrors:
        """The command's parser."""
        build: Callable[[], OneLineErrors] = import_module(self.module).build_parser
        return build()

    def run(self, arguments: Sequence[str]) -> None:
        """Run the command on what follows its name."""
        import_module(self.module).run(arguments)


TRAINER_COMMANDS = {  # and what the help says of them
    "fit": "Train the network that a config describes.",
    "validate": "Score a run's checkpoint on the validation split.",
    "test": "The same under tags of its own.",
    "predict": "Write the loss of each validation sequence to predictions.jsonl.",
}
OUR_COMMANDS = {
    "generate": Command("mmrec.commandline.command_generate"),
    "export": Command("mmrec.commandline.command_export"),
    "prepare": Command("mmrec.commandline.command_prepare"),
    "configs": Command("mmrec.commandline.command_configs"),
    "doctor": Command("mmrec.commandline.command_doctor"),
}


_ELSEWHERE = {"train": "fit", "eval": "validate", "evaluate": "validate"}  # what other programs call them


def chosen_command(arguments: Sequence[str]) -> str | None:
    """The command that the arguments begin with; None where they begin with an option, such as `--help`.

    Raises:
        ValueError: no command, or one that does not exist.
    """
    names = (*TRAINER_COMMANDS, *OUR_COMMANDS)
    if not arguments:
        raise ValueError(f"no command given; choose one of {', '.join(names)}, or --help")
    first = arguments[0]
    if first.startswith("-"):
        return None
    if first not in names:
        meant = _ELSEWHERE.get(first) or nearest_name(first, names)
        raise ValueError(f"no command {first}{did_you_mean(meant)} Commands: {', '.join(names)}")
    return first
