"""What stands in the place of a result that could not be had."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Failure:
    """What stands in the place of a result: the first line of what went wrong."""

    reason: str


def reason_of(error: BaseException) -> str:
    """An error in one line."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:300]


def guarded(function: Callable[[Any], Any], item: Any) -> Any:
    """`function(item)`, or the Failure."""
    try:
        return function(item)
    except Exception as error:
        return Failure(reason_of(error))
