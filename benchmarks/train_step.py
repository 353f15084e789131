"""Whole training steps on this machine, through the training module and Lightning's Trainer as `mmrec fit` runs them.

`python benchmarks/train_step.py` writes benchmarks/results/train_step_<gpu>.json, a row a case; rows of cases not run now stay.
`--list` shows the cases, `--only 370m,llama` runs some, `--only 370m --profile` also prints the kernels of one step. On a CPU:
`--only tiny`. Every case has a process of its own; one that fails leaves a row with the reason, and makes the exit code 1.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from train_step_cases import CASES, DEFAULT, Case, check_settings

from mmrec.commandline.errors import one_line_errors
from mmrec.commandline.plain_parser import PlainParser, command_line, output_file, seconds, whole_number
from mmrec.measuring.failures import reason_of
from mmrec.measuring.machine import device, machine, short_name
from mmrec.measuring.results import read_rows, write_rows
from mmrec.nearest import did_you_mean, nearest_name

RESULTS = Path(__file__).parent / "results"
PROGRAM = "python benchmarks/train_step.py"
PEERS = {"llama": "hf_llama_374m", "llama_long": "hf_llama_374m"}
WIDTH = 80  # of the terminal
Row = dict[str, Any]


def end_with(parent: int) -> None:
    """Ask once a second whether the process that wants the answer is still there, and exit where it is not: the GPU is wanted elsewhere."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def work(task: dict[str, Any]) -> int:
    """Measure in this process and write the answer where the task says; the exit code."""
    threading.Thread(target=end_with, args=(task["parent"],), daemon=True).start()
    try:
        from train_step_worker import run

        case = CASES[task["case"]].changed(task["set"])
        case = replace(case, warmup=task["warmup"] or case.warmup, steps=task["steps"] or case.steps)
        answer: dict[str, Any] = {"rows": run(case, task["batch"], task["began"], task["profile"], task["memory_gib"])}
    except Exception as error:
        import traceback

        traceback.print_exc()
        answer = {"failed": reason_of(error), "out_of_memory": "out of memory" in str(error).lower()}
    write_rows(Path(task["answer"]), [answer])
    return 1 if "failed" in answer else 0


def measure(name: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """What a fresh process says of a case and a batch: `rows`, or why it `failed`."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        environment = dict(os.environ)
        if CASES[name].cold:
            environment |= {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        task = {
            "case": name,
            "batch": batch,
            "set": options.set,
            "profile": options.profile,
            "memory_gib": options.memory_gib,
            "warmup": options.warmup,
            "steps": options.steps,
            "answer": str(answer),
            "parent": os.getpid(),
            "began": time.time(),
        }
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(task)]
        try:
            code = subprocess.run(command, env=environment, timeout=options.seconds, check=False).returncode
        except subprocess.TimeoutExpired:
            return {"failed": f"no answer within {options.seconds:.0f} s"}
        if not answer.exists():
            return {"failed": f"its process died (exit code {code})"}
        found: dict[str, Any] = json.loads(answer.read_text())[0]
        return found


def rows_of(name: str, options: argparse.Namespace, place: dict[str, Any]) -> list[Row]:
    """A case's rows, at the largest batch that fits; one that says why there is none."""
    case: Case = CASES[name].changed(options.set)
    found: dict[str, Any] = {}
    for batch in (options.batch,) if options.batch else case.batches:
        found = measure(name, batch, options)
        if "rows" in found:
            return list(found["rows"])
        print(f"NOT MEASURED: {case.name} at B {batch}: {found['failed']}", flush=True)
        if not found.get("out_of_memory"):
            break
    return [
        {"case": case.name, "what": case.what, "config": case.config, "B": batch, "T": case.seq_len, "failed": found["failed"], **place}
    ]


def with_peers(rows: Sequence[Row]) -> None:
    """Enter the peers' tokens a second in the rows of the network they stand beside, at the same batch and length."""
    for row in rows:
        for peer in rows:
            name = PEERS.get(peer["case"])
            same = all(row.get(key) == peer.get(key) for key in ("B", "T", "gpu"))
            if name and peer.get("tokens_per_s") and row["config"] == "h100_370m" and "peers" in row and same:
                row["peers"][name] = peer["tokens_per_s"]


def line(row: Row) -> str:
    """A row for the terminal."""
    if "failed" in row:
        return f"{row['case']}: NOT MEASURED: {row['failed']}"
    units = {
        "tokens_per_s": "{:,.0f} tokens/s", "ms_per_step": "{:.2f} ms", "mfu": "MFU {:.1%}", "peak_gib": "peak {:.2f} GiB",
        "reserved_gib": "reserved {:.2f} GiB", "host_ms": "host {:.1f} ms", "first_step_s": "first step {:.1f} s",
        "first_step_of_fit_s": "of fit {:.1f} s", "loss": "loss {:.4f}", "loss_step": "after {} steps",
        "weights_gib": "weights {:.3f} GiB", "activations_gib": "activations {:.3f} GiB",
    }  # fmt: skip
    shown = [form.format(row[name]) for name, form in units.items() if row.get(name) is not None]
    heading = f"{row['case']} B {row['B']} T {row['T']} UBÖO {'on' if row['uboo'] else 'off'}:"
    return textwrap.fill(f"{heading} {', '.join(shown)}", width=WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = PlainParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(DEFAULT), help="cases, separated by commas")
    parser.add_argument("--list", action="store_true", help="show the cases")
    parser.add_argument("--output", type=output_file, help="the JSON file; benchmarks/results/train_step_<gpu>.json")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one step more")
    parser.add_argument(
        "--set", action="append", default=[], help="network.NAME=VALUE (or model.network.NAME), model.… or trainer.…: a row of its own name"
    )
    parser.add_argument("--batch", type=whole_number, help="B, in the place of the cases' own")
    parser.add_argument("--warmup", type=whole_number, help="steps before the clock, in the place of the cases' own")
    parser.add_argument("--steps", type=whole_number, help="steps under the clock, in the place of the cases' own")
    parser.add_argument("--memory-gib", type=float, default=79.0, help="GPU memory to use at most, an H100's by default; 0 for all")
    parser.add_argument("--seconds", type=seconds, default=400.0, help="the longest that a case may take")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not 0 <= options.memory_gib < float("inf"):
        parser.error(f"--memory-gib: {options.memory_gib} is no memory; 0 takes all of the GPU's")
    options.names = options.only.split(",")
    for name in options.names:
        if name not in CASES:
            nearest = did_you_mean(nearest_name(name, CASES, cutoff=0.5)) or f"; there are {', '.join(CASES)}"
            parser.error(f"--only: no case {name}{nearest}")
        try:
            check_settings(CASES[name].changed(options.set), options.set)
        except ValueError as error:
            parser.error(f"--set: {error}")
        if device().type == "cpu" and not (name.startswith("tiny") or options.list or options.worker):
            parser.error(f"no CUDA device for {name}; --only tiny runs on the CPU")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write.

    Args:
        arguments: what follows the program's name; None: `sys.argv`.

    Returns:
        The exit code: 1 where a case could not be measured.
    """
    options = parse(arguments)
    if options.worker:
        return work(json.loads(options.worker))
    if options.list:
        print("\n".join(f"{case.name:22s}{'*' if case.name in DEFAULT else ' '} {case.what}" for case in CASES.values()))
        return 0
    place = machine(device())
    command = command_line(PROGRAM, arguments)
    output = options.output or RESULTS / f"train_step_{short_name(place['gpu'])}.json"
    print(f"{place['gpu']}, torch {place['torch']}, triton {place['triton']}, {place['date']}", flush=True)
    with one_line_errors():
        rows: list[Row] = read_rows(output) if output.exists() else []
    failed = False
    for name in options.names:
        begin = time.monotonic()
        found = [row | {"command": command} for row in rows_of(name, options, place)]
        failed |= any("failed" in row for row in found)
        print("\n".join(map(line, found)) + f" ({time.monotonic() - begin:.0f} s)", flush=True)
        rows = [row for row in rows if row["case"] != found[0]["case"]] + found
        with_peers(rows)
        write_rows(output, rows)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
