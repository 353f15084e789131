"""Bytes between a GPU and its memory while the projections of one block run, read by NVIDIA's profiler ncu.

Run as a module it is the process that ncu looks into: it marks one forward of the projections and nothing else.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from mmrec.blocks.hem import FusedProjections, SeparateProjections
from mmrec.commandline.plain_parser import PlainParser
from mmrec.scripts.benchmark_options import DTYPES, Settings
from mmrec.scripts.hem_parity import built_on

METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
SECONDS = 300


class DramBytes(NamedTuple):
    """What ncu read, or why there is nothing.

    Attributes:
        total: bytes read and written; None without a figure.
        reason: None with one.
    """

    total: int | None
    reason: str | None


def dram_bytes(settings: Settings, hem: bool) -> DramBytes:
    """Bytes of one forward of a block's projections, caches left as the products before leave them."""
    if not settings.ncu:
        return DramBytes(None, "not asked for: --ncu")
    if settings.where.type != "cuda":
        return DramBytes(None, "no CUDA device")
    if shutil.which("ncu") is None:
        return DramBytes(None, "no ncu on PATH")
    config = settings.config
    profiler = ["ncu", "--profile-from-start", "off", "--cache-control", "none", "--csv", "--print-units", "base"]
    child = [
        sys.executable, "-m", "mmrec.scripts.dram_traffic", "--hem" if hem else "--no-hem", "--device", str(settings.where),
        "--model-dim", str(config.model_dim), "--pe-dim", str(config.pe_width),
        "--tokens", str(settings.tokens), "--precision", settings.precision,
    ]  # fmt: skip
    root = str(Path(__file__).parents[2])  # a checkout need not be installed
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [*profiler, "--metrics", ",".join(METRICS), *child]
    try:
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return DramBytes(None, f"ncu: {type(error).__name__}")
    return read_report(answer.stdout + answer.stderr)


def read_report(text: str) -> DramBytes:
    """The sum of both metrics over all kernels of what ncu printed; its own error as the reason where there are none."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = [row for row in csv.DictReader(lines) if row.get("Metric Name") in METRICS]
    values = [row["Metric Value"].replace(",", "") for row in rows]
    if values and all(value.replace(".", "", 1).isdigit() for value in values):
        return DramBytes(round(sum(float(value) for value in values)), None)
    errors = [line.removeprefix("==ERROR==").strip() for line in text.splitlines() if line.startswith("==ERROR==")]
    return DramBytes(None, f"ncu: {errors[0]}" if errors else "ncu printed no figures")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the projections once between the profiler's marks.

    Args:
        arguments: what follows the program's name; None: `sys.argv`.
    """
    parser = PlainParser(description=__doc__)
    for name in ("--model-dim", "--pe-dim", "--tokens"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--precision", choices=DTYPES, required=True)
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--hem", action=argparse.BooleanOptionalAction, required=True)
    options = parser.parse_args(arguments)
    torch.cuda.set_device(options.device)
    with built_on(options.device, DTYPES[options.precision]), torch.no_grad():
        projections = (FusedProjections if options.hem else SeparateProjections)(options.model_dim, options.pe_dim)
        x = torch.randn(options.tokens, options.model_dim)
        projections(x)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        projections(x)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
