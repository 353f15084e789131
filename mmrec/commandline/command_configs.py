"""`configs`: the shipped configs, or given ones, with their parameters, memory and tokens; and how one is spread over GPUs."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from jsonargparse.typing import PositiveFloat, PositiveInt

from mmrec.commandline.configs import config_layers, merge, shipped_configs
from mmrec.commandline.errors import BadInputError
from mmrec.commandline.memory_estimate import Estimate, errors_of, estimate
from mmrec.commandline.memory_plan import advice, asked_by, plans
from mmrec.commandline.parser import PROGRAM, OneLineErrors

_NOTE = (
    "Of a GPU that holds all weights, gradients and AdamW states, as under plain data parallelism; --explain NAME knows of shards. "
    "Activations are an estimate from the sizes, not a measurement; the allocator adds 5 to 15 %."
)

_GATHERED = (
    "Gathered: in shards, whole weights and gradients of the blocks that run and of what lies around them; under DDP, gradients beside the "
    "buckets they are sent in. Sent: by each GPU in an optimiser step, all micro-batches together. It fits where 5 % are left for the "
    "allocator, which takes up to 15 %; the libraries' own memory, some GB, is not counted."
)


def build_parser() -> OneLineErrors:
    """`configs [NAME ...] [--devices N] [--json]`, `configs --explain NAME [--gpus N] [--gpu-memory GB] [--json]`."""
    parser = OneLineErrors(prog=f"{PROGRAM} configs", description="List configs with parameters, memory need and tokens.")
    parser.add_argument("names", nargs="*", type=str, help="Names or paths of configs; none: all shipped ones.")
    parser.add_argument("--devices", type=PositiveInt, default=1, help="GPUs of the run: its tokens are multiplied by it.")
    parser.add_argument("--explain", type=str, metavar="NAME", help="What each GPU holds and sends under each strategy, and which to take.")
    parser.add_argument("--gpus", type=PositiveInt, default=1, help="With --explain: GPUs that train together.")
    parser.add_argument("--gpu-memory", type=PositiveFloat, default=80.0, help="With --explain: GB of memory of each.")
    parser.add_argument("--json", action="store_true", help="Print JSON, bytes and counts as whole numbers.")
    return parser


def run(arguments: Sequence[str]) -> None:
    """Print the table, or JSON."""
    options = build_parser().parse_args(list(arguments))
    if options.explain is not None:
        if options.names:
            raise BadInputError(f"--explain explains one config, {options.explain}; leave {options.names[0]} out")
        _explain(options.explain, options.gpus, options.gpu_memory, options.json)
        return
    estimates = [_estimate(name, options.devices) for name in options.names or shipped_configs()]
    if options.json:
        print(json.dumps([{**asdict(row), "total": row.total} for row in estimates], indent=2, ensure_ascii=False))
    else:
        _print_table(estimates, options.devices)


def _estimate(name: str, devices: int) -> Estimate:
    content = merge(config_layers(name))
    with errors_of(name, content):
        return estimate(name, content, devices)


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


def _explain(name: str, gpus: int, memory_gb: float, as_json: bool) -> None:
    content = merge(config_layers(name))
    with errors_of(name, content):
        found, used = plans(name, content, gpus), asked_by(content, gpus).kind
    memory = memory_gb * 1e9
    taken = advice(found, used, memory)
    if as_json:
        rows = [{**asdict(plan), "total": plan.total, "fits": plan.fits(memory)} for plan in found]
        print(json.dumps({"config": name, "strategy": used, "plans": rows, "advice": taken}, indent=2, ensure_ascii=False))
        return
    from mmrec.commandline.sheets import Sheet, show

    titles = ("weights", "gradients", "optimiser", "activations ≈", "gathered ≈", "total ≈", f"fits {memory_gb:g} GB", "sent a step")
    lines = [
        (
            plan.strategy,
            *(f"{size / 1e9:.3g}" for size in (plan.weights, plan.gradients, plan.optimizer, plan.activations, plan.gathered, plan.total)),
            "yes" if plan.fits(memory) else "no",
            f"{plan.sent / 1e9:.3g}" if plan.sent else "–",
        )
        for plan in found
    ]
    several = f"{gpus} GPUs" if gpus > 1 else "one GPU"
    show(Sheet(f"{name}: GB a GPU, of {several}", ("strategy",), titles, lines, caption=_GATHERED))
    print(f"{name} on one GPU. {taken}" if used == several else f"{name} uses {used} on {several}. {taken}")


def _count(number: int) -> str:
    """1,270,000,000 as `1.27 B`."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g} {letter}"
    return str(number)
