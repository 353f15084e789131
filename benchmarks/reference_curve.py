"""The loss curve that a run of a shipped config should have: three seeds of its first 200 steps on the built-in text, as a band.

`python benchmarks/reference_curve.py cpu_tiny` writes benchmarks/results/reference_cpu_tiny.json, `… h100_125m` on a GPU that config's. A
later run that leaves the band has learned something else: a test says so (tests/test_reference_curve.py).
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmrec.commandline.errors import one_line_errors
from mmrec.commandline.plain_parser import PlainParser, output_file
from mmrec.files import write_atomically
from mmrec.measuring.machine import device, machine
from mmrec.studies.runs import Run, assemble
from mmrec.studies.statistics import smoothed
from mmrec.studies.training import train

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
STEPS = 200
STRETCH = 20  # steps whose losses are averaged
MARGIN = 0.02  # nats on both sides: what other processors and versions change
VOCABULARY = 4096  # the built-in text's, whatever the config trains on

Band = list[dict[str, float]]


def curve(config: str, seed: int, folder: Path, steps: int = STEPS) -> list[float]:
    """The training loss of a config's first steps, a mean for each stretch, in nats.

    Args:
        config: name of a shipped one; of its data only the batch's size and the sequences' length are kept.
        seed: of weights and data order.
        folder: where the built-in text is kept.
        steps: how many.
    """
    data = {"source": "sample", "vocab_size": VOCABULARY, "tokenizer": None, "num_workers": 0, "validation_batches": 2}
    content = assemble(config, {"trainer.max_steps": steps, "model.network.vocab_size": VOCABULARY})
    content["data"]["init_args"] |= data | {"cache_dir": str(folder)}
    run = Run(study="reference", variant=None, content=content, seed=seed, validations=1, final_batches=1)
    points = train(run).curves["train/loss_main"]
    return [value for _, value in smoothed([value for _, value in points], steps // STRETCH)]


def band(curves: Sequence[Sequence[float]]) -> Band:
    """The lowest and the highest of some curves at each stretch, with the margin."""
    return [
        {"to_step": STRETCH * (index + 1), "low": round(min(values) - MARGIN, 4), "high": round(max(values) + MARGIN, 4)}
        for index, values in enumerate(zip(*curves, strict=True))
    ]


def outside(values: Sequence[float], reference: Band) -> list[str]:
    """A line for each stretch in which a curve leaves the band."""
    return [
        f"to step {point['to_step']}: {value:.4f}, not {point['low']:.4f} … {point['high']:.4f}"
        for value, point in zip(values, reference, strict=True)
        if not point["low"] <= value <= point["high"]
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the seeds, write the band.

    Args:
        arguments: what follows the program's name; None: `sys.argv`.
    """
    parser = PlainParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="name of a shipped config")
    parser.add_argument("--output", type=output_file, help="the JSON file to write; default: benchmarks/results/reference_CONFIG.json")
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        options = parser.parse_args(arguments)
        curves = []
        for seed in SEEDS:
            curves.append(curve(options.config, seed, Path(folder)))
            print(f"seed {seed}: {' '.join(f'{value:.3f}' for value in curves[-1])}", flush=True)
        content: dict[str, Any] = {"config": options.config, "steps": STEPS, "seeds": SEEDS, "band": band(curves), **machine(device())}
        path = options.output or RESULTS / f"reference_{options.config}.json"
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
