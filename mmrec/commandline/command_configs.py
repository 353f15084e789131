"""`configs`: the shipped configs, or given ones, with their parameters, memory and tokens."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from jsonargparse.typing import PositiveInt

from mmrec.commandline.configs import config_layers, merge, shipped_configs
from mmrec.commandline.memory_estimate import Estimate, estimate
from mmrec.commandline.parser import PROGRAM, OneLineErrors

_NOTE = (
    "A GPU's share under data parallelism: each holds all weights, gradients and AdamW states. Activations are an estimate from the "
    "sizes, not a measurement; the allocator adds 5 to 15 %."
)


def build_parser() -> OneLineErrors:
    """`configs [NAME ...] [--devices N] [--json]`."""
    parser = OneLineErrors(prog=f"{PROGRAM} configs", description="List configs with parameters, memory need and tokens.")
    parser.add_argument("names", nargs="*", type=str, help="Names or paths of configs; none: all shipped ones.")
    parser.add_argument("--devices", type=PositiveInt, default=1, help="GPUs of the run: its tokens are multiplied by it.")
    parser.add_argument("--json", action="store_true", help="Print JSON, bytes and counts as whole numbers.")
    return parser


def run(arguments: Sequence[str]) -> None:
    """Print the table, or JSON."""
    options = build_parser().parse_args(list(arguments))
    estimates = [estimate(name, merge(config_layers(name)), options.devices) for name in options.names or shipped_configs()]
    if options.json:
        print(json.dumps([{**asdict(row), "total": row.total} for row in estimates], indent=2, ensure_ascii=False))
    else:
        _print_table(estimates, options.devices)


def _print_table(estimates: Sequence[Estimate], devices: int) -> None:
    from mmrec.commandline.sheets import Sheet, show

    titles = (
        "parameters",
        "without UBÖO",
        "weights",
        "gradients",
        "optimiser",
        "activations ≈",
        "total ≈",
        "tokens a step",
        "tokens of the run",
    )
    rows = [
        (
            row.name,
            row.shape,
            row.precision,
            _count(row.parameters),
            _count(row.parameters_inference),
            *(f"{size / 1e9:.3g}" for size in (row.weights, row.gradients, row.optimizer, row.activations, row.total)),
            _count(row.tokens_per_step),
            _count(row.tokens) if row.tokens is not None else "no end",
        )
        for row in estimates
    ]
    title = f"Memory in GB a GPU; tokens of {devices} GPU{'s' if devices > 1 else ''}"
    show(Sheet(title, ("config",), ("layers × width", "precision", *titles), rows, caption=_NOTE))


def _count(number: int) -> str:
    """1,270,000,000 as `1.27 B`."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g} {letter}"
    return str(number)
