"""jsonargparse's messages reduced to one line that names the key, the fault and the nearest valid name.

For a value that fits no member of a union jsonargparse prints the whole union, one error a member, nested as deep as the
classes are. Only one of them says what is wrong: the member that got furthest. The messages are text without structure,
so they are read by their indentation; whatever is not recognised is joined to one line unchanged.
"""

import inspect
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from mmrec.commandline.class_paths import ALLOWED_PACKAGES, imported_class
from mmrec.nearest import did_you_mean, nearest_key, nearest_name

_UNKNOWN_KEYS = (
    re.compile(r"Subcommand '[^']+' does not accept option '(?P<key>[^']+)'"),
    re.compile(r"unrecognized arguments: --(?P<key>[^\s=]+)"),
    re.compile(r"Key '(?P<key>[^']+)' is not expected"),
    re.compile(r"Option '(?P<key>[^']+)' is not accepted"),
)
_MISSING = re.compile(r"the following arguments are required: (?P<names>.*)")
_NUMBER = re.compile(r"Not of type (?P<type>\w+):.*?(?P<value>'[^']*'$|\S+(?= does not conform))")
_KEY = re.compile(r'Parser key "(?P<key>[^"]+)":\s*(?P<rest>.*)', re.DOTALL)
_CLASS = re.compile(r"Problem with given class_path '(?P<path>[^']+)':\s*(?P<rest>.*)", re.DOTALL)
_OPTION = re.compile(r"Option '(?P<key>[^']+)' is not accepted")
_GOT = re.compile(r"^(?P<expected>Expected an? .*?)\.? Got value: (?P<value>.*)$", re.DOTALL)
_DENIED = re.compile(r"Importing '(?P<path>[^']+)' is not allowed")
_NO_ATTRIBUTE = re.compile(r"module '(?P<module>[^']+)' has no attribute '(?P<name>[^']+)'")
_NO_CLASS = re.compile(r"(?:Expected a dot import path string|No class named|Unexpected import path format)[:\s]+'?(?P<name>[\w.]+)")
_NUMBER_NAMES = {
    "PositiveInt": "a whole number above 0",
    "NonNegativeInt": "a whole number from 0",
    "PositiveFloat": "a number above 0",
    "NonNegativeFloat": "a number from 0",
    "ClosedUnitInterval": "a number from 0 to 1",
    "OpenUnitInterval": "a number between 0 and 1",
}
_UNITS = {"gpu_memory": "GB", "min_bus_bandwidth": "GB/s"}  # of options of ours, by name
_LITERAL = re.compile(r"(?:typing\.)?Literal\[(?P<values>.*)\]")

_NO_MAPPING = re.compile(r"Unable to load config '(?P<value>[^']*)'")
_RAISED = re.compile(r"^\s*- (?P<message>[\w.]+ is .*; give .*)$", re.MULTILINE)  # by a class of ours, which names its key

_CHECKPOINT = ("resume", "resume_from_checkpoint", "resume_from", "checkpoint")  # what other programs call it
_GONE = ("planning_horizon",)  # configs that earlier runs saved have it


class _Context(NamedTuple):
    keys: tuple[str, ...]  # the dotted key so far
    class_path: str | None  # the class whose arguments are being read
    known_keys: tuple[str, ...]
    known_classes: Mapping[str, Sequence[str]]

    @property
    def key(self) -> str:
        return ".".join(self.keys)


def one_line(message: str, known_keys: Iterable[str] = (), known_classes: Mapping[str, Sequence[str]] | None = None) -> str:
    """Reduce a message of jsonargparse to one line.

    Args:
        message: as given to `ArgumentParser.error`.
        known_keys: dotted keys the parser accepts, to find the nearest one.
        known_classes: names of classes that may be given without their package, by the key that takes them.
    """
    keys = tuple(known_keys)
    for pattern in _UNKNOWN_KEYS:
        if match := pattern.match(message.strip()):
            leaf = match["key"].rpartition(".")[2]
            if leaf in _CHECKPOINT and "ckpt_path" in keys:
                return f"unknown key {match['key']}; a checkpoint is given as --ckpt_path FILE, or last for the newest"
            if leaf in _GONE:
                return f"unknown key {match['key']}: there is no such option any more; take it out of the config"
            return f"unknown key {match['key']}{did_you_mean(nearest_key(match['key'], keys))}"
    if message.startswith("unrecognized arguments:"):
        return f"{message.strip()}; options start with -- and are spelled out"
    if match := _MISSING.match(message.strip()):
        names = [name.removeprefix(f"{command}.") for name in match["names"].split(", ") for command in [name.partition(".")[0]]]
        return f"missing {', '.join(f'--{name}' for name in names)}; give it a value"
    if match := _RAISED.search(message):
        return match["message"]
    return _reduce(message, _Context((), None, keys, known_classes or {}))


def _reduce(message: str, context: _Context) -> str:
    message = inspect.cleandoc(message).strip()
    if match := _KEY.match(message):
        keys = tuple(part for part in match["key"].split(".") if part not in ("init_args", "dict_kwargs"))
        # Within a class jsonargparse begins the key anew, within a list it repeats it.
        keys = keys if context.keys and keys[: len(context.keys)] == context.keys else (*context.keys, *keys)
        return _reduce(match["rest"], context._replace(keys=keys))
    if match := _CLASS.match(message):
        return _reduce(match["rest"], context._replace(class_path=match["path"]))
    if "Errors:" in message and "Union subtypes" in message:
        return _reduce_union(message, context)
    if message.startswith("- "):
        entries = _entries(message)
        return _reduce(max(entries, key=_depth), context)
    return _leaf(message, context)


def _entries(block: str) -> list[str]:
    """The items of a list whose items start with `- ` at the block's own indentation."""
    items: list[str] = []
    for line in block.splitlines():
        if line.startswith("- "):
            items.append(line[2:])
        elif items:
            items[-1] += "\n" + line
    return items


def _depth(entry: str) -> int:
    """How far a member of a union got: a class of which something is wrong says more than a type that does not fit at all."""
    if "Problem with given class_path" in entry or "Parser key" in entry:
        return 3
    if _DENIED.search(entry) or _NO_CLASS.search(entry) or _OPTION.search(entry):
        return 2
    return 1 if "Union subtypes" in entry else 0


def _reduce_union(message: str, context: _Context) -> str:
    head, _, tail = message.partition("Errors:")
    body, found, given = tail.rpartition("Given value type:")  # the last is this union's, others are of unions within
    if not found:
        body, given = tail, ""
    value = given.partition("Given value:")[2].strip()
    nested = re.fullmatch(r"NestedArg\(key='(?P<key>[^']+)', val='(?P<value>.*)'\)", value, re.DOTALL)
    entries = _entries(inspect.cleandoc(body.strip("\n")))
    best = max(entries, key=_depth, default="")
    if entries and _depth(best) > 0:
        return _reduce(best, context)
    plain = [entry for entry in entries if entry.startswith(("Expected", "Not a valid subclass", "Not of type"))]
    if not plain:
        return _leaf(f"{head.strip()} {' '.join(body.split())}", context)
    got = nested["value"] if nested else value
    key = f"{context.key}.{nested['key']}" if nested else context.key
    return f"{key}: expected {_alternatives(plain)}, got {_short(got)}{_choice(got, plain)}"


def _choices(entries: Sequence[str]) -> list[str]:
    """Values of the Literals among the expected types."""
    literals = [match["values"] for entry in entries if (match := _LITERAL.search(" ".join(entry.split())))]
    return list(dict.fromkeys(value.strip(" '") for values in literals for value in values.split(",")))


def _choice(got: str, entries: Sequence[str]) -> str:
    return did_you_mean(nearest_name(got, _choices(entries), cutoff=0.5))


def _alternatives(entries: Sequence[str]) -> str:
    """What would have been accepted, Literals joined to one list."""
    choices = _choices(entries)
    types = dict.fromkeys(_expected(entry) for entry in entries if not _LITERAL.search(entry))
    if choices:
        types.pop("int", None)  # a Literal of numbers, whose values jsonargparse does not show
    return " or ".join([*([f"one of {', '.join(choices)}"] if choices else []), *types])


def _expected(entry: str) -> str:
    """`Expected a <class 'int'>` as `int`."""
    text = re.sub(r"^Expected an? ", "", " ".join(entry.split()))
    item, _, got = text.partition(". Got value: ")
    if got:  # of a list; the whole list is told
        return f"a list of {_expected(f'Expected a {item}')}"
    if text.startswith("Not a valid subclass"):
        return "a class path, or a mapping with class_path and init_args,"
    if match := re.match(r"Not of type (\w+)", text):
        return _NUMBER_NAMES.get(match[1], match[1])
    text = re.sub(r"<class '([^']+)'>", lambda found: found[1].rpartition(".")[2], text)
    return "null" if text == "NoneType" else text.rstrip(".")


def _short(value: str, limit: int = 80) -> str:
    value = " ".join(value.split())
    return value if len(value) <= limit else f"{value[:limit]}…"


def _leaf(message: str, context: _Context) -> str:
    text = " ".join(message.split())
    prefix = f"{context.key}: " if context.keys else ""
    if match := _OPTION.search(text):
        owner = f" of {context.class_path.rpartition('.')[2]}" if context.class_path else ""
        nearest = nearest_name(match["key"], _arguments(context.class_path))
        group = f"{context.key}." if context.keys else ""
        return f"unknown key {group}{match['key']}{owner}{did_you_mean(nearest and group + nearest)}"
    if match := _DENIED.search(text):
        return f"{prefix}class path {match['path']} is refused; a config may name classes of {', '.join(ALLOWED_PACKAGES)}"
    known_classes = context.known_classes.get(context.key, ())
    if match := _NO_ATTRIBUTE.search(text):
        names = [*known_classes, *(name for name in dir(sys.modules.get(match["module"])) if name[:1].isupper())]
        return f"{prefix}{match['module']} has no class {match['name']}{did_you_mean(nearest_name(match['name'], names, cutoff=0.5))}"
    if match := _NO_CLASS.search(text):
        nearest = nearest_name(match["name"], known_classes, cutoff=0.5)
        few = f"; choose one of {', '.join(known_classes)}" if 0 < len(known_classes) < 9 else "; give its full class path"
        return f"{prefix}no class {match['name']}{did_you_mean(nearest) or few}"
    if match := _MISSING.search(text):
        return f"{prefix}{context.class_path or 'the class'} needs {match['names']}"
    if match := _NO_MAPPING.search(text):
        return f"{prefix}expected a mapping of keys to values, got {match['value']}"
    if match := _NUMBER.search(text):
        expected = _NUMBER_NAMES.get(match["type"], match["type"])
        if unit := _UNITS.get(context.key):
            expected = expected.replace("a number", f"a number of {unit}")
        return f"{prefix}expected {expected}, got {_short(match['value'])}"
    if match := _GOT.match(text):
        entries = [match["expected"]]
        return f"{prefix}expected {_alternatives(entries)}, got {_short(match['value'])}{_choice(match['value'], entries)}"
    if text.startswith("Not a valid subclass of"):
        return f"{prefix}expected a class path, or a mapping with class_path and init_args"
    return f"{prefix}{text}"


def _arguments(class_path: str | None) -> list[str]:
    """Names of a class's arguments, its bases' included; none where it was not imported."""
    cls = imported_class(class_path) if class_path else None
    if not isinstance(cls, type):
        return []
    names: set[str] = set()
    for base in cls.__mro__:
        if (initialiser := base.__dict__.get("__init__")) is not None and base is not object:
            parameters = list(inspect.signature(initialiser).parameters.values())[1:]
            names.update(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    return sorted(names)
