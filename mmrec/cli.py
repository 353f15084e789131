"""The command line: `python -m mmrec.cli COMMAND`; Lightning's `fit`, `validate`, `test`, `predict` and our own commands.

Run it with `--help` for the list, and `COMMAND --help` for one of them.
"""

import os
import sys
from collections.abc import Sequence

from mmrec.commandline.commands import OUR_COMMANDS, chosen_command
from mmrec.commandline.errors import one_line_errors
from mmrec.stop_signals import keep_stop_signals

WORLD_WRITABLE = 0o002  # which nothing that a command makes shall be, whatever the user's umask; processes that it starts inherit it


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; bad input ends in one line and exit code 2.

    Args:
        arguments: what follows the program's name; None: `sys.argv`.
    """
    os.umask(os.umask(0) | WORLD_WRITABLE)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with one_line_errors():
        command = chosen_command(arguments)
        if command in OUR_COMMANDS:
            OUR_COMMANDS[command].run(arguments[1:])
            return
        if command == "fit":
            keep_stop_signals()
        from mmrec.commandline.trainer_cli import run_trainer  # Lightning takes seconds to import, our own commands do without

        run_trainer(arguments)


if __name__ == "__main__":
    main()
