"""The valid name nearest to a mistyped one."""

import difflib
from collections.abc import Iterable


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """The most similar of `names`, None where there are none; a prefix or an abbreviation is as good as a typing slip."""
    candidates = sorted(set(names))
    prefixed = [candidate for candidate in candidates if candidate.startswith(name)]
    found = difflib.get_close_matches(name, prefixed or candidates, n=1, cutoff=0.0)
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
    siblings = [candidate for candidate in known if candidate.startswith(prefix) and "." not in candidate[len(prefix) :]]
    groups = {candidate.split(".")[0] for candidate in known} if not group else set()
    return nearest_name(key, [*siblings, *groups] or known)


def did_you_mean(nearest: str | None) -> str:
    """`; did you mean X?`, or nothing."""
    return f"; did you mean {nearest}?" if nearest else ""
