"""What `decode.py` measures: its command line, how much is measured where, and what it refuses before anything is built."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmrec.commandline.errors import BadInputError
from mmrec.commandline.plain_parser import PlainParser, output_file, whole_number
from mmrec.config import MMRecConfig
from mmrec.measuring.machine import device, machine, short_name
from mmrec.measuring.results import read_rows
from mmrec.scripts.benchmark_options import DTYPES, PRESETS

RESULTS = Path(__file__).parent / "results"
WORSE = 1.5  # times as far from fp32 as the network's own step a decoder's logits may be: both round, at different places
ROUNDING = 1e-5  # what needs no comparison


def limit_of(error_of_step: float) -> float:
    """How far from fp32 a decoder's logits may be where those of the network's own step are so far."""
    return max(WORSE * error_of_step, ROUNDING)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured.

    Attributes:
        contexts: tokens read before decoding; ascending.
        prompt: tokens of the longest prompt whose reading is measured, with its half and its quarter.
        chunk_sizes: tokens read at a time, each a measurement; the last also reads the contexts.
        batches: sequences decoded at once.
        tokens: steps timed.
    """

    contexts: tuple[int, ...]
    prompt: int
    chunk_sizes: tuple[int, ...]
    batches: tuple[int, ...]
    tokens: int


PLANS = {
    "cuda": Plan(contexts=(1, 1000, 100_000, 1_000_000), prompt=131_072, chunk_sizes=(2048, 8192), batches=(1, 2, 4, 8), tokens=100),
    "cpu": Plan(contexts=(1, 100, 300), prompt=256, chunk_sizes=(32, 64), batches=(1, 2), tokens=5),
}


def plan_for(kind: str, longest: int | None) -> Plan:
    """What is measured on a kind of device, without contexts and prompts longer than asked for."""
    plan = PLANS[kind]
    if longest is None:
        return plan
    contexts = tuple(length for length in plan.contexts if length <= longest)
    return Plan(**vars(plan) | {"contexts": contexts or (1,), "prompt": min(plan.prompt, longest)})


def parse(description: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `output` and `sweep_output` filled in."""
    parser = PlainParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = device()
    parser.add_argument("--size", choices=PRESETS, help="a shipped config's network; 7b on a GPU, tiny on a CPU")
    parser.add_argument("--precision", choices=DTYPES, default="bf16" if where.type == "cuda" else "fp32", help="of the weights")
    parser.add_argument("--longest", type=whole_number, help="leave out contexts and prompts longer than this")
    parser.add_argument("--output", type=output_file, help="the JSON file to write; default: benchmarks/results/decode_<gpu>.json")
    parser.add_argument("--sweep", action="store_true", help="time tiles of the decoding kernels too, before everything else")
    parser.add_argument("--only-sweep", action="store_true", help="and nothing else")
    parser.add_argument(
        "--sweep-output", type=output_file, help="where the sweep's table goes; default: decode_tiles_<gpu>.json beside the output"
    )
    options = parser.parse_args(arguments)
    if where.type == "cpu" and options.size is None and options.output is None:
        parser.error("no CUDA device; --size tiny --output FILE decodes a tiny network on the CPU")
    options.size = options.size or ("7b" if where.type == "cuda" else "tiny")
    name = short_name(machine(where)["gpu"])
    options.output = options.output or RESULTS / f"decode_{name}.json"
    options.sweep_output = options.sweep_output or options.output.with_name(f"decode_tiles_{name}.json")
    return options


def require_same_size(output: Path, size: str, precision: str, config: MMRecConfig) -> None:
    """Raise where a file that is to be replaced holds the rows of another network.

    Raises:
        BadInputError: in one line, with the remedy.
    """
    if not output.exists():
        return
    wanted = {"size": size, "precision": precision, "D": config.model_dim, "H": config.heads, "L": config.num_layers}
    for row in read_rows(output):
        other = {key: row[key] for key, value in wanted.items() if row.get(key, value) != value}
        if other:
            held = ", ".join(f"{key} {value}" for key, value in other.items())
            raise BadInputError(f"{output} holds rows of another network ({held}); give another file as --output, or remove this one")
