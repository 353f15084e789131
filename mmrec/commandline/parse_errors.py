"""jsonargparse's messages reduced to one line that names the key, the fault and the nearest valid name.

For a value that fits no member of a union jsonargparse prints the whole union, one error a member, nested as deep as the
classes are. Only one of them says what is wrong: the member that got furthest. The messages are text without structure,
so they are read by their indentation; whatever is not recognised is joined to one line unchanged.
"""

import inspect
import re
from collections.abc import Iterable
from typing import NamedTuple

from mmrec.commandline.class_paths import ALLOWED_PACKAGES, imported_class
from mmrec.commandline.nearest import did_you_mean, nearest_key, nearest_name

_UNKNOWN_KEYS = (
    re.compile(r"Subcommand '[^']+' does not accept option '(?P<key>[^']+)'"),
    re.compile(r"unrecognized arguments: --(?P<key>[^\s=]+)"),
    re.compile(r"Key '(?P<key>[^']+)' is not expected"),
    re.compile(r"Option '(?P<key>[^']+)' is not accepted"),
)
_KEY = re.compile(r'Parser key "(?P<key>[^"]+)":\s*(?P<rest>.*)', re.DOTALL)
_CLASS = re.compile(r"Problem with given class_path '(?P<path>[^']+)':\s*(?P<rest>.*)", re.DOTALL)
_OPTION = re.compile(r"Option '(?P<key>[^']+)' is not accepted")
_GOT = re.compile(r"^(?P<expected>Expected an? .*?)\.? Got value: (?P<value>.*)$", re.DOTALL)
_DENIED = re.compile(r"Importing '(?P<path>[^']+)' is not allowed")
_NO_ATTRIBUTE = re.compile(r"module '(?P<module>[^']+)' has no attribute '(?P<name>[^']+)'")
_NO_CLASS = re.compile(r"(?:Expected a dot import path string|No class named|Unexpected import path format)[:\s]+'?(?P<name>[\w.]+)")
_LITERAL = re.compile(r"(?:typing\.)?Literal\[(?P<values>.*)\]")


class _Context(NamedTuple):
    keys: tuple[str, ...]  # the dotted key so far
    class_path: str | None  # the class whose arguments are being read
    known_keys: tuple[str, ...]
    known_classes: tuple[str, ...]

    @property
    def key(self) -> str:
        return ".".join(self.keys)


def one_line(message: str, known_keys: Iterable[str] = (), known_classes: Iterable[str] = ()) -> str:
    """Reduce a message of jsonargparse to one line.

    Args:
        message: as given to `ArgumentParser.error`.
        known_keys: dotted keys the parser accepts, to find the nearest one.
        known_classes: names of classes that may be given without their package.
    """
    keys = tuple(known_keys)
    for pattern in _UNKNOWN_KEYS:
        if match := pattern.match(message.strip()):
            return f"unknown key {match['key']}{did_you_mean(nearest_key(match['key'], keys))}"
    if message.startswith("unrecognized arguments:"):
        return f"{message.strip()}; options start with -- and are spelled out"
    return _reduce(message, _Context((), None, keys, tuple(known_classes)))


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
    body, _, given = tail.partition("Given value type:")
    value = given.partition("Given value:")[2].strip()
    nested = re.fullmatch(r"NestedArg\(key='(?P<key>[^']+)', val='(?P<value>.*)'\)", value, re.DOTALL)
    entries = _entries(inspect.cleandoc(body.strip("\n")))
    best = max(entries, key=_depth, default="")
    if entries and _depth(best) > 0:
        return _reduce(best, context)
    expected = [_expected(entry) for entry in entries if entry.startswith("Expected")]
    expected = [text for text in dict.fromkeys(expected) if text]
    if not expected:
        return _leaf(f"{head.strip()} {' '.join(body.split())}", context)
    got = nested["value"] if nested else value
    key = f"{context.key}.{nested['key']}" if nested else context.key
    return f"{key}: expected {' or '.join(expected)}, got {_short(got)}"


def _expected(entry: str) -> str:
    """`Expected a <class 'int'>` as `int`."""
    text = re.sub(r"^Expected an? ", "", " ".join(entry.split()))
    if match := _LITERAL.match(text):
        return f"one of {match['values']}"
    text = re.sub(r"<class '([^']+)'>", lambda found: found[1].rpartition(".")[2], text)
    return "null" if text == "NoneType" else text.rstrip(".")


def _short(value: str, limit: int = 80) -> str:
    value = " ".join(value.split())
    return value if len(value) <= limit else f"{value[:limit]}…"


def _leaf(message: str, context: _Context) -> str:
    text = " ".join(message.split())
    prefix = f"{context.key}: " if context.keys else ""
    if match := _OPTION.search(text):
        name = (context.class_path or "").rpartition(".")[2]
        names = _arguments(context.class_path)
        owner = f"{name} has no argument {match['key']}" if name else f"no argument {match['key']}"
        return f"{prefix}{owner}{did_you_mean(nearest_name(match['key'], names))}"
    if match := _DENIED.search(text):
        return f"{prefix}class path {match['path']} is refused; a config may name classes of {', '.join(ALLOWED_PACKAGES)}"
    if match := _NO_ATTRIBUTE.search(text):
        module = imported_class(match["module"])
        names = [name for name in (*dir(module), *context.known_classes) if name[:1].isupper()] if module else context.known_classes
        return f"{prefix}{match['module']} has no class {match['name']}{did_you_mean(nearest_name(match['name'], names))}"
    if match := _NO_CLASS.search(text):
        return f"{prefix}no class {match['name']}{did_you_mean(nearest_name(match['name'], context.known_classes))}"
    if match := _GOT.match(text):
        expected = _expected(match["expected"])
        choices = re.findall(r"'([^']*)'", expected)
        return f"{prefix}expected {expected}, got {_short(match['value'])}{did_you_mean(nearest_name(match['value'], choices))}"
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
        if "__init__" in base.__dict__ and base is not object:
            kinds = inspect.signature(base.__init__).parameters.values()
            names.update(p.name for p in kinds if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self")
    return sorted(names)
