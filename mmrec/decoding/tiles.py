"""Tiles of the decoding kernels, from `tiles.json`: those of the 7B network, smaller where a network is; never searched for at run time.

Of a product's kernel a program takes R outputs and reads BW words of their rows at a time; of the memory's, BV columns of a head; of the
window's, BN slots of a head.
`benchmarks/decode.py --sweep` times others and writes such a file.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mmrec.ops.launching import blocks, power_of_two

TABLE = Path(__file__).parent / "tiles.json"
WORDS_A_WARP = 128  # four words, 16 bytes, a thread: with fewer some threads of a program would have nothing to load
PROGRAMS = 264  # two a multiprocessor of a large GPU: a product of few outputs takes fewer a program
CELLS = 16384  # of a head's M in a program's registers
WORDS = 4096  # of a window's keys in a program's registers, and as many of its values
SUMS = 8192  # of a head's sums over a window's slots that are merged at a time
_OVERRIDES: dict[str, Any] = {}


@cache
def read_table() -> dict[str, Any]:
    """The table: `kernels`, options by name; `PDL`; `found`, where and when they were measured (null: estimated)."""
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def product_options(kernel: str, outputs: int, words: int, batch: int) -> dict[str, int]:
    """`R`, `BW` and `num_warps` of a product of `outputs` rows of `words` words with `batch` vectors; overridden ones as they are."""
    if kernel in _OVERRIDES:
        return dict(_OVERRIDES[kernel])
    options = dict(read_table()["kernels"][kernel])
    options["BW"] = min(options["BW"], power_of_two(words))
    options["num_warps"] = max(1, min(options["num_warps"], options["BW"] // WORDS_A_WARP))
    if batch > 2:  # every vector has sums of its own in the registers
        options["R"] = max(1, options["R"] // 2)
    while options["R"] > 1 and outputs < PROGRAMS * options["R"]:
        options["R"] //= 2
    return options


def memory_options(width: int) -> dict[str, int]:
    """`BK`, `BV` and `num_warps` for heads of `width` channels."""
    options = dict(_OVERRIDES.get("memory") or read_table()["kernels"]["memory"])
    rows = power_of_two(width)
    columns = max(1, min(options["BV"], rows, CELLS // rows))
    return options | {"BK": rows, "BV": columns, "num_warps": max(1, min(options["num_warps"], rows * columns // 256))}


def window_options(width: int, words: int, window: int, heads: int) -> dict[str, int]:
    """`BK`, `BW`, `BN`, `SPLITS`, `PARTS` and `num_warps` for `heads` heads of all sequences; overridden ones as they are.

    Args:
        width: channels of a head.
        words: of a row of keys.
        window: slots, W.
        heads: B·H.
    """
    options: dict[str, int] = dict(_OVERRIDES.get("window") or read_table()["kernels"]["window"])
    slots, row = min(options["BN"], power_of_two(window)), power_of_two(words)
    if "window" not in _OVERRIDES:
        slots = min(slots, max(1, WORDS // row))
        while slots > 1 and 2 * heads * blocks(window, slots) < PROGRAMS:
            slots //= 2
    splits, columns = blocks(window, slots), power_of_two(width)
    parts = min(power_of_two(splits), max(1, SUMS // columns))
    warps = max(1, min(options["num_warps"], slots * row // WORDS_A_WARP))
    return {"BK": columns, "BW": row, "BN": slots, "SPLITS": splits, "PARTS": parts, "num_warps": warps}


def dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may start before the one ahead of it has ended: Hopper and later, unless the table or an override says no."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return bool(_OVERRIDES.get("PDL", read_table()["PDL"]))


@contextmanager
def overridden(**options: Any) -> Iterator[None]:
    """Steps made within take other options, for tuning and for tests: `overridden(out={"R": 2, "BW": 512, "num_warps": 4}, PDL=0)`."""
    before = dict(_OVERRIDES)
    _OVERRIDES.update(options)
    try:
        yield
    finally:
        _OVERRIDES.clear()
        _OVERRIDES.update(before)
