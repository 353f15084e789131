"""Lines for whoever watches a run, which must not end it."""

import contextlib
import sys


def tell(line: str) -> None:
    """Print a line on the standard error, unless that cannot be written: it may lie on the disk whose being full is told of."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
