"""Options of every kernel for the interpreter: tiles of 16 tokens, so that a short sequence has several of them and a tail."""

from typing import Any

from mmrec.ops.tuning import read_table

_SMALL = {"BD": 8, "R": 4, "G": 4, "LEVELS": 2, "STAGES": 1, "C": 16, "BM": 16, "BN": 16, "BK": 16, "BV": 16, "fused": 0}


def small_tiles(**changes: int) -> dict[str, dict[str, Any]]:
    """What `overridden` takes: the table's options, whichever shape class, with small tiles and `changes`."""
    kernels = read_table("sm90")["kernels"]
    merged = {kernel: {name: value for row in rows.values() for name, value in row.items()} for kernel, rows in kernels.items()}
    small = {**_SMALL, **changes}
    return {kernel: {name: small.get(name, value) for name, value in options.items()} for kernel, options in merged.items()}
