"""The arguments as given, made ready for jsonargparse: config names become the contents of the files they stand for."""

from collections.abc import Sequence
from typing import NamedTuple

import yaml

from mmrec.commandline.configs import config_layers

CONFIG_OPTIONS = ("-c", "--config")


class ExpandedArguments(NamedTuple):
    """Arguments with every `--config` replaced by its layers, and the names given to `--config`, in order."""

    arguments: list[str]
    config_names: list[str]


def expand_configs(arguments: Sequence[str]) -> ExpandedArguments:
    """Replace each `--config NAME` by one `--config CONTENT` for every file that NAME stands for, its bases first.

    jsonargparse takes a config's content as well as its path. Giving it the content resolves names among the shipped
    configs, takes `base` out, and keeps it from opening paths of its own.

    Raises:
        FileNotFoundError, ValueError: see `find_config` and `read_config`; `--config` without a name.
    """
    expanded: list[str] = []
    names: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        option, equals, name = argument.partition("=")
        if option not in CONFIG_OPTIONS:
            expanded.append(argument)
            continue
        if not equals:
            name = next(rest, "")
        if not name or name.startswith("--"):
            raise ValueError(f"{option} needs the name or path of a config")
        names.append(name)
        for layer in config_layers(name):
            if layer.content:
                expanded += ["--config", yaml.safe_dump(layer.content, sort_keys=False)]
    return ExpandedArguments(expanded, names)
