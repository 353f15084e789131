"""The valid name nearest to a mistyped one."""

import difflib
from collections.abc import Iterable


def nearest_name(name: str, names: Iterable[str], cutoff: float = 0.0) -> str | None:
    """The one of `names` that `name` probably means: by its beginning, its initials (`lr`: learning_rate), or its spelling.

    None where nothing is at least as similar as `cutoff`, from 0 (anything) to 1 (the same).
    """
    candidates = sorted(set(names))
    begun = [candidate for candidate in candidates if candidate.startswith(name)]
    abbreviated = [candidate for candidate in candidates if "".join(word[:1] for word in candidate.split("_")) == name]
    found = difflib.get_close_matches(name, begun or abbreviated or candidates, n=1, cutoff=0.0 if begun or abbreviated else cutoff)
    return found[0] if found else None


def nearest_key(key: str, keys: Iterable[str]) -> str | None:
    """The dotted key that was probably meant by `key`: the same name in another group, a similar key, or a similar name in its group."""
    known = sorted(set(keys))
    group, _, leaf = key.rpartition(".")
    same_leaf = [candidate for candidate in known if candidate.rpartition(".")[2] == leaf]
    if same_leaf:
        return nearest_name(key, same_leaf)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    if close:
        return close[0]
    prefix = f"{group}." if group else ""
    siblings = [candidate[len(prefix) :] for candidate in known if candidate.startswith(prefix) and "." not in candidate[len(prefix) :]]
    sibling = nearest_name(leaf, siblings)
    return prefix + sibling if sibling else nearest_name(key, known)


def did_you_mean(nearest: str | None) -> str:
    """`; did you mean X?`, or nothing."""
    return f"; did you mean {nearest}?" if nearest else ""
