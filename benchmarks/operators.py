"""The operators on this machine: parity against float64 first, then times against the floor, and what others need.

`python benchmarks/operators.py` writes benchmarks/results/ops_<gpu>.json, a list of rows, and a plot beside it. A parity miss is named
and makes the exit code 1, but stops nothing. `--cold` adds the first call with an empty kernel cache.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from operator_cases import OPERATORS, Timing, draw, flops, moved_bytes, name_of, run, timings
from operator_parity import Finding, all_findings, check_at, worst
from operator_peers import BUDGET, Peers, versions
from operator_plot import draw_plot
from torch import Tensor

from mmrec.commandline.plain_parser import PlainParser, command_line, output_file, seconds
from mmrec.commandline.sheets import Sheet, show
from mmrec.measuring.clocks import copy_rate, input_sets, kernel_ms, product_rate
from mmrec.measuring.failures import reason_of
from mmrec.measuring.machine import device, machine, short_name, synchronize
from mmrec.measuring.results import write_rows
from mmrec.nearest import did_you_mean, nearest_name

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def calls(timing: Timing, direction: str, sets: Sequence[dict[str, Any]], cotangent: Tensor) -> list[Callable[[], Any]]:
    """What is timed: the public function on each set of inputs, with its gradients where the direction asks for them."""
    operator = OPERATORS[timing.operator]

    def forward(inputs: dict[str, Any]) -> Callable[[], Any]:
        def call() -> Any:
            with torch.no_grad():
                return operator.op(**inputs, **timing.options)

        return call

    def both(inputs: dict[str, Any]) -> Callable[[], Any]:
        leaves = {name: t.detach().requires_grad_() for name, t in inputs.items() if t.is_floating_point()}
        # The last state is used by nothing, as in training.
        return lambda: torch.autograd.grad(operator.op(**(inputs | leaves), **timing.options)[0], list(leaves.values()), cotangent)

    return [forward(inputs) if direction == "fwd" else both(inputs) for inputs in sets]


def measure(timing: Timing, rates: tuple[float, float], findings: list[Finding], place: dict[str, Any], graphs: bool) -> list[Row]:
    """Rows of one operator and shape, a direction each; what was timed is compared with the truth on some channels before.

    Args:
        rates: of a copy in TB/s and of a matrix product in TFLOP/s, in this run.
        findings: of the parity check; those of this shape are appended.
        graphs: whether calls are timed replayed from a CUDA graph, which leaves out the host.
    """
    operator, where, shape = OPERATORS[timing.operator], device(), timing.shape
    new = lambda: draw(operator, shape, timing.dtype, timing.gate_dtype, where, state=timing.state, reset=timing.reset)  # noqa: E731
    inputs = new()
    with torch.no_grad():
        outputs = operator.op(**inputs, **timing.options)
    cotangent = torch.randn_like(outputs[0])
    here = check_at(timing, inputs, run(operator.op, inputs, [cotangent, None], timing.options), cotangent)
    findings += here
    rows = []
    for direction in timing.directions:
        moved = moved_bytes(operator, inputs, outputs, direction)
        work = flops(operator, shape, direction)
        sets = [inputs] + [new() for _ in range(input_sets(moved, where) - 1)]
        ms, alone, eager, replayed = kernel_ms(calls(timing, direction, sets, cotangent), where, graphs)
        floor = max(moved / rates[0], work / rates[1]) / 1e9
        own = [f for f in findings if f.operator == timing.operator]
        rows.append(
            {
                "op": timing.operator, "B": shape.B, "T": shape.T, "D": shape.D, "H": shape.H, "dtype": name_of(timing.dtype),
                "direction": direction, "ms": ms, "floor_ms": floor, "bytes": moved, "copy_tbps": rates[0],
                "gate_dtype": name_of(timing.gate_dtype), "max_rel_err": worst(own, timing, direction), "peers": {},
                **place, "P": shape.P, "W": shape.W, "J": shape.J, "reset": timing.reset, "K": shape.K if shape.H else None, "flops": work,
                "gemm_tflops": rates[1], "share_of_floor": floor / ms, "alone_ms": alone, "eager_ms": eager, "replayed": replayed,
                "accum_dtype": name_of(timing.accum) if timing.accum else None,
                "err_at_this_shape": worst(here, timing, direction), "parity": "missed" if any(f.missed for f in own) else "ok",
            }
        )  # fmt: skip
        share = f"{100 * floor / ms:.0f} % of the floor"
        print(f"{timing.operator} {shape} {direction}\n  {ms:.4f} ms, {share}; called from Python {eager:.4f} ms", flush=True)
    return rows


def add_peers(peers: Peers, measured: Sequence[tuple[Timing, list[Row]]], save: Callable[[], None]) -> None:
    """Fill in the others' times, one peer after another, so that a slow one delays none of the rest; saved after each."""
    where = device()
    for name in peers.names:
        for timing, rows in measured:
            if name not in peers.of(timing):
                continue
            operator = OPERATORS[timing.operator]
            inputs = draw(operator, timing.shape, timing.dtype, timing.gate_dtype, where)
            found, reason = peers.measure(name, timing, inputs)
            for row in rows:
                clocked = found[row["direction"]]
                row["peers"][name] = clocked and clocked.ms
                row.setdefault("peer_versions", {}).update(versions([name]))
                if clocked is None and reason:
                    row.setdefault("peer_notes", {})[name] = reason
                elif clocked and clocked.replayed != row["replayed"]:
                    row.setdefault("peer_notes", {})[name] = "replayed from a graph" if clocked.replayed else "timed from Python"
        save()


def first_calls() -> dict[str, float]:
    """Seconds of the first call of each operator, forward and backward, in bf16 at a network's shapes, and of all of them."""
    where = device()
    torch.zeros(1, device=where).sum().item()
    found = {}
    begin = time.perf_counter()
    for timing in timings(quick=True, device=torch.device("cpu")):  # small: what takes time is the compilation
        operator, shape = OPERATORS[timing.operator], timing.shape
        if where.type == "cuda":
            sizes = {name: size for name, size in {"H": 8, "P": 1024, "W": 128, "J": 4}.items() if getattr(shape, name)}
            shape = type(shape)(2, 512, 1024, **sizes)
        start = time.perf_counter()
        inputs = draw(operator, shape, timing.dtype, timing.gate_dtype, where)
        output = operator.op(**inputs, **timing.options)[0]
        run(operator.op, inputs, [torch.randn_like(output), None], timing.options)
        synchronize(where)
        found[operator.name] = time.perf_counter() - start
    return found | {"all": time.perf_counter() - begin}


def cold_row(place: dict[str, Any]) -> Row:
    """`first_calls` in a fresh process with an empty kernel cache."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_CACHE_DIR": cache, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        command = [sys.executable, str(Path(__file__).resolve()), "--first-calls"]
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if answer.returncode:
        raise RuntimeError((answer.stderr.strip().splitlines() or ["no message"])[-1])
    seconds = json.loads(answer.stdout.splitlines()[-1])
    print(f"first call of all operators, forward and backward, empty cache: {seconds['all']:.1f} s", flush=True)
    empty = dict.fromkeys(("B", "T", "D", "H", "dtype", "ms", "floor_ms", "bytes", "copy_tbps", "gate_dtype", "max_rel_err"))
    return {"op": "all", "direction": "cold_first_call", "seconds": seconds["all"], "by_operator": seconds, **empty, "peers": {}, **place}


def report_misses(findings: Sequence[Finding]) -> None:
    """Every miss by name, or that there is none."""
    missed = [finding for finding in findings if finding.missed]
    for f in missed:
        print(f"PARITY MISS: {f.tensor}: {f.error:.2e} > {f.limit:.0e}; {f.case}" + (f"; {f.note}" if f.note else ""), flush=True)
    largest: dict[tuple[str, str], Finding] = {}
    for f in findings:
        key = (f.operator, name_of(f.dtype))
        if not f.missed and (key not in largest or f.error / f.limit > largest[key].error / largest[key].limit):
            largest[key] = f
    for (name, dtype), f in sorted(largest.items()):
        print(f"parity of {name} {dtype}: nearest to its limit {f.tensor}, {f.error:.1e} of {f.limit:.0e}")
    print(f"parity: {len(findings)} tensors compared, {len(missed)} missed", flush=True)


def table(rows: Sequence[Row]) -> Sheet:
    """The rows for a terminal."""
    lines = []
    for row in rows:
        if row["ms"] is None:
            continue
        widths = f"H{row['H']}×{row['K']}" if row["H"] else f"D{row['D']}" + (f" P{row['P']}" if row["P"] not in (None, row["D"]) else "")
        widths += "".join(f" {name}{row[name]}" for name in "WJ" if row[name])
        error = "–" if row["max_rel_err"] is None else f"{row['max_rel_err']:.0e}"
        shape = f"B{row['B']} T{row['T']} {widths}{' packed' if row['reset'] else ''}"
        dtypes = f"{_SHORT.get(row['dtype'], row['dtype'])}{_sums(row)}, {_SHORT.get(row['gate_dtype'], row['gate_dtype'])} gates"
        lines.append(
            (
                f"{row['op']} {row['direction']}: {shape}, {dtypes}", f"{row['ms']:.4f}", f"{row['eager_ms']:.4f}",
                f"{row['floor_ms']:.4f}", f"{100 * row['share_of_floor']:.0f} %", error if row["parity"] == "ok" else f"{error} MISSED",
            )
        )  # fmt: skip
        lines += [(f"  {name}", "–" if ms is None else f"{ms:.4f}", *[""] * 4) for name, ms in row["peers"].items()]
    titles = ("ms", "from Python", "floor", "share", "error")
    note = "Medians; share of the floor by copy or matrix product of this run; below an operator the others."
    return Sheet("Operators", ("operator",), titles, lines, caption=note)


_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def _sums(row: Row) -> str:
    return f" ({row['accum_dtype']} sums)" if row["accum_dtype"] else ""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = PlainParser(description=__doc__)
    parser.add_argument("--output", type=output_file, help="the JSON file to write; benchmarks/results/ops_<gpu>.json")
    parser.add_argument("--only", default=",".join(OPERATORS), help="operators, separated by commas")
    parser.add_argument("--quick", action="store_true", help="few cases and one shape an operator, tiny on a CPU")
    parser.add_argument("--peers", choices=("none", "fast", "all"), help="fast: those that need no tuning; all, but none with --quick")
    parser.add_argument("--peer-seconds", type=seconds, default=BUDGET, help="what a peer may take over all shapes, compilation included")
    parser.add_argument("--graphs", choices=("yes", "no"), default="yes", help="time calls replayed from a CUDA graph; no: with the host")
    parser.add_argument("--parity", choices=("yes", "no", "only"), default="yes", help="no: times alone, for work on a kernel")
    parser.add_argument("--plot", type=output_file, help="where the plot goes; beside the output, as .svg")
    parser.add_argument("--cold", action="store_true", help="also time the first call with an empty kernel cache")
    parser.add_argument("--seed", type=int, help="of the inputs; a fresh one each run, printed")
    parser.add_argument("--first-calls", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.names = options.only.split(",")
    for name in options.names:
        if name not in OPERATORS:
            nearest = did_you_mean(nearest_name(name, OPERATORS, cutoff=0.5)) or f"; there are {', '.join(OPERATORS)}"
            parser.error(f"--only: no operator {name}{nearest}")
    if device().type == "cpu" and not (options.quick or options.first_calls):
        parser.error("no CUDA device; --quick runs tiny shapes on the CPU")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure, write.

    Args:
        arguments: what follows the program's name; None: `sys.argv`.

    Returns:
        The exit code: 1 where a tensor missed its limit or something could not be measured.
    """
    options = parse(arguments)
    if options.first_calls:
        print(json.dumps(first_calls()))
        return 0
    where = device()
    place = machine(where) | {"command": command_line("python benchmarks/operators.py", arguments)}
    seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(4), "little") // 2
    print(f"{place['gpu']}, torch {place['torch']}, triton {place['triton']}, {place['date']}; seed {seed}", flush=True)
    output = options.output or RESULTS / f"ops_{short_name(place['gpu'])}.json"

    begin = time.monotonic()
    findings = [] if options.parity == "no" else all_findings(options.names, options.quick, seed)
    report_misses(findings)
    print(f"in {time.monotonic() - begin:.0f} s", flush=True)
    if options.parity == "only":
        return 1 if any(finding.missed for finding in findings) else 0

    torch.manual_seed(seed)
    rates = (copy_rate(where), product_rate(where))
    print(f"device copy {rates[0]:.3f} TB/s (read + write), matrix product {rates[1]:.1f} TFLOP/s", flush=True)
    rows: list[Row] = []
    measured: list[tuple[Timing, list[Row]]] = []
    # An illegal access would take the rest of this process with it.
    unsafe = {f.operator for f in findings if any(mark in f.note for mark in ("CUDA error", "AcceleratorError", "died"))}
    broken = False

    def save() -> None:
        write_rows(output, rows)

    before = len(findings)
    for timing in timings(options.quick, where):
        if timing.operator not in options.names:
            continue
        if timing.operator in unsafe:
            print(f"NOT MEASURED: {timing.operator} {timing.shape}: it broke its process in the parity check", flush=True)
            continue
        try:
            found = measure(timing, rates, findings, place, options.graphs == "yes" and where.type == "cuda")
        except Exception as error:  # one operator's failure must not cost the others' figures
            broken = True
            print(f"NOT MEASURED: {timing.operator} {timing.shape}: {reason_of(error)}", flush=True)
            continue
        rows += found
        measured.append((timing, found))
        save()
    if len(findings) > before:
        print("at the timed shapes:", flush=True)
        report_misses(findings[before:])
    if options.cold:
        try:
            rows.append(cold_row(place))
        except Exception as error:
            broken = True
            print(f"NOT MEASURED: the first call with an empty cache: {reason_of(error)}", flush=True)
    save()
    peers = Peers(options.peers or ("none" if options.quick else "all"), options.peer_seconds, where, options.graphs == "yes")
    add_peers(peers, measured, save)
    print(f"device copy at the end {copy_rate(where):.3f} TB/s", flush=True)
    draw_plot(rows, options.plot or output.with_suffix(".svg"))
    show(table(rows))
    print(output)
    return 1 if broken or any(finding.missed for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
