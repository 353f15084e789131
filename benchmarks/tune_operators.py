"""Find the tile sizes of the operators' kernels on this machine and write them into mmrec/ops/tables/<architecture>.json.

`python benchmarks/tune_operators.py` takes the candidates of tuning_candidates.json, kernel by kernel and shape class by shape class:
compiles them all in parallel, times the pass each is used in, and checks the best against float64 (a short odd length with document
starts and a state; some channels at the timed size) and, whole, against the present options; `--check all` checks every one. What does
not compile, launch or agree is named and left out. Rows whose options choose between kernels (no `num_warps` among them) come last,
with the best of all others in place. `--output DIR` writes the table there too, with all timings.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from operator_cases import Timing, moved_bytes
from tuning_shapes import Forced, Kernels, Key, Options, Prepared, compile_one, is_plan, rows_read, tuned_shapes, using

from mmrec.commandline.plain_parser import PlainParser
from mmrec.files import write_atomically
from mmrec.measuring.clocks import median_ms, replayed_ms
from mmrec.measuring.failures import Failure, guarded, reason_of
from mmrec.measuring.machine import device, machine, short_name
from mmrec.measuring.processes import map_in_processes
from mmrec.ops import tuning

CANDIDATES = Path(__file__).parent / "tuning_candidates.json"
TABLES = Path(tuning.__file__).parent / "tables"
BEST = 2  # candidates of a row that are checked, timed at length and printed
KEEP = 0.99  # the table's present options stay unless others take less than this share of their time


@dataclass(eq=False)
class Result:
    """One candidate of one row of the table."""

    options: Options
    ms: dict[str, float] = field(default_factory=dict)  # by shape, of the passes the kernel is used in
    score: float = math.inf
    compile_seconds: float | None = None
    failure: str | None = None
    checked: bool = False


@dataclass(eq=False)
class Row:
    """A row of the table to be tuned: where it is reached, and its candidates.

    Attributes:
        context: options of other kernels under which this one runs at all.
        reached: indices of timed shapes, with the passes that launch the kernel.
    """

    key: Key
    context: Forced
    reached: dict[int, list[str]]
    results: list[Result]


def workers(shapes: Sequence[Timing]) -> int:
    """How many processes may run the largest shape side by side; 0, this process, where there is no GPU."""
    if device().type == "cpu":
        return 0
    largest = 40 * max(t.shape.B * t.shape.T * t.shape.D for t in shapes) + 2**30  # bytes: inputs, outputs, gradients; CUDA's own
    return max(1, min(16, os.cpu_count() or 1, int(0.9 * torch.cuda.mem_get_info()[0] / largest)))


def reach(shapes: Sequence[Timing], kernels: Kernels, trials: Sequence[tuple[int, Forced]]) -> list[dict[Key, list[str]]]:
    """Which rows of the table a shape, by index, reads in which pass, for each trial; nothing where it does not run."""
    work = [(shapes[index], kernels, forced) for index, forced in trials]
    found: list[dict[Key, list[str]]] = []
    for (timing, _, forced), answer in zip(work, map_in_processes(rows_read, work, workers(shapes), seconds=120), strict=True):
        found.append({})
        if isinstance(answer, Failure):
            print(f"cannot run {timing.operator} {timing.shape} {forced or ''}: {answer.reason}", flush=True)
            continue
        for name, keys in answer.items():
            for key in keys:
                found[-1].setdefault(key, []).append(name)
    return found


def rows_to_tune(candidates: dict[str, dict[str, list[Options]]], shapes: Sequence[Timing], kernels: Kernels) -> list[Row]:
    """Rows in the order of tuning; a row that only another plan of its shape class reaches is tuned under the first such plan."""
    wanted = {(kernel, name): options for kernel, rows in candidates.items() for name, options in rows.items()}
    trials: list[tuple[int, Forced]] = [(index, ()) for index in range(len(shapes))]
    first = reach(shapes, kernels, trials)
    missing = {key for key in wanted if not any(key in passes for passes in first)}
    others: list[tuple[int, Forced]] = []
    for index, passes in enumerate(first):
        for (kernel, name), choices in wanted.items():
            if (kernel, name) in passes and any(name == other and shared(kernel, away) for away, other in missing):
                others += [(index, ((kernel, options),)) for options in choices if is_plan(options)]
    found: dict[Key, Row] = {}
    for (index, forced), passes in zip(trials + others, first + reach(shapes, kernels, others), strict=True):
        for key, names in passes.items():
            if key in wanted and (key in missing or not forced):
                present = kernels[key[0]][key[1]]
                results = [Result(options) for options in [present, *(o for o in wanted[key] if o != present)]]
                row = found.setdefault(key, Row(key, forced, {}, results))
                if row.context == forced:
                    row.reached[index] = names
    for kernel, name in wanted:
        if (kernel, name) not in found:
            print(f"not tuned: no timed shape reaches {kernel} {name}", flush=True)
    return sorted(found.values(), key=lambda row: (is_plan(row.results[0].options), row.key))


def shared(kernel: str, other: str) -> bool:
    """Whether two kernels are of one operator."""
    return kernel.partition(".")[0] == other.partition(".")[0]


def kernels_ms(call: Callable[[], None], repeat_ms: int, warmup_ms: int) -> float:
    """Median milliseconds without the host, which launches some kernels more slowly than they run."""
    return median_ms(call, device()) if device().type == "cpu" else replayed_ms([call], repeat_ms, warmup_ms)


def time_row(row: Row, prepared: dict[int, Prepared], kernels: Kernels, deadline: float, check_all: bool) -> None:
    """Time all candidates of a row briefly; check the present options and the best, and time those again, longer."""
    kernel = row.key[0]

    def measure(result: Result, check: bool) -> None:
        scores = []
        for index, passes in row.reached.items():
            shape = prepared[index]
            with using(kernels, ((kernel, result.options), *row.context)):
                if check:
                    shape.check()
                calls = shape.passes()
                span = (60, 25) if check else (15, 5)
                ms = sum(kernels_ms(calls[name], *span) for name in passes)
            result.ms[shape.label] = ms
            floor = moved_bytes(shape.operator, shape.inputs, [shape.cotangent], "fwd")  # only a weight: shapes count alike
            scores.append(math.log(ms / floor))
        result.score = math.exp(sum(scores) / len(scores))
        result.checked = check

    def attempt(result: Result, check: bool) -> None:
        if result.failure is None and time.monotonic() > deadline:
            result.failure = "not measured: the time was spent"
        if result.failure is None:
            failure = guarded(lambda r: measure(r, check), result)
            result.failure = failure.reason if isinstance(failure, Failure) else None

    for result in row.results:
        attempt(result, check=False)
    attempt(row.results[0], check=True)  # the first, which the others are compared with
    for result in sorted(row.results[1:], key=lambda r: r.score):
        if check_all or sum(r.checked for r in row.results[1:]) < BEST:
            attempt(result, check=True)


def choose(row: Row) -> Result | None:
    """The fastest, or the present options where nothing beats them clearly; None where nothing ran."""
    good = sorted((r for r in row.results if r.failure is None and r.checked), key=lambda r: r.score)
    if not good:
        return None
    present = row.results[0]
    return present if present in good and good[0].score > KEEP * present.score else good[0]


def report(row: Row, chosen: Result | None) -> None:
    """The three best of a row, and who failed."""
    print(f"{' '.join(row.key)}" + ("".join(f", with {name} {options}" for name, options in row.context)), flush=True)
    good = sorted((r for r in row.results if r.failure is None and r.checked), key=lambda r: r.score)
    for result in good[:BEST] + [r for r in row.results[:1] if r in good[BEST:]]:
        marks = (" present" if result is row.results[0] else "") + (" CHOSEN" if result is chosen else "")
        print("  " + ", ".join(f"{shape} {ms:.4f} ms" for shape, ms in result.ms.items()), json.dumps(result.options) + marks)
    for result in row.results:
        if result.failure:
            print(f"  FAILED {json.dumps(result.options)}: {result.failure}", flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = PlainParser(description=__doc__)
    parser.add_argument("--only", help="operators or kernels, separated by commas: linear_scan,gated_scan.backward")
    parser.add_argument("--rows", help="shape classes, separated by commas: 512,512_few; all of them otherwise")
    parser.add_argument("--candidates", type=Path, default=CANDIDATES, help="JSON: kernel → shape class → list of options")
    parser.add_argument("--output", type=Path, help="a folder for the table and all timings")
    parser.add_argument("--seconds", type=float, default=280, help="what is not measured by then is left out")
    parser.add_argument("--check", choices=("best", "all"), default="best", help="whether the slow ones are checked as well")
    parser.add_argument("--quick", action="store_true", help="one shape an operator; tiny under the interpreter, which writes no table")
    options = parser.parse_args(arguments)
    if device().type == "cpu" and not (options.quick and options.output):
        parser.error("no CUDA device; --quick with --output tries the script through Triton's interpreter (TRITON_INTERPRET=1)")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune, print, write.

    Args:
        arguments: what follows the program's name; None: `sys.argv`.

    Returns:
        The exit code: 1 where a row has no working candidate.
    """
    options = parse(arguments)
    begin, where = time.monotonic(), device()
    wanted = json.loads(options.candidates.read_text(encoding="utf-8"))
    if options.only:
        names = options.only.split(",")
        wanted = {kernel: rows for kernel, rows in wanted.items() if kernel in names or kernel.partition(".")[0] in names}
    if options.rows:
        wanted = {kernel: {row: o for row, o in rows.items() if row in options.rows.split(",")} for kernel, rows in wanted.items()}
    place = machine(where)
    name = "sm{}{}".format(*torch.cuda.get_device_capability(where)) if where.type == "cuda" else "sm90"
    kernels: Kernels = json.loads(json.dumps(tuning.read_table(tuning.architecture(where.index))["kernels"]))
    shapes = [t for t in tuned_shapes(options.quick) if t.operator in {kernel.partition(".")[0] for kernel in wanted}]
    rows = rows_to_tune(wanted, shapes, kernels)
    total = sum(len(row.results) for row in rows)
    print(f"{place['gpu']}: {total} candidates of {len(rows)} rows, {time.monotonic() - begin:.0f} s", flush=True)

    jobs = [(row, result, next(iter(row.reached))) for row in rows for result in row.results]
    work = [(shapes[index], kernels, ((row.key[0], result.options), *row.context)) for row, result, index in jobs]
    # Side by side in all cores: what takes long is the compiler, and it writes into one cache.
    answers = map_in_processes(compile_one, work, workers(shapes), seconds=90)
    for (_, result, _), answer in zip(jobs, answers, strict=True):
        if isinstance(answer, Failure):
            result.failure = answer.reason
        else:
            result.compile_seconds = max(answer, result.compile_seconds or 0.0)
    print(f"compiled, {time.monotonic() - begin:.0f} s", flush=True)

    prepared: dict[int, Prepared] = {}
    complete = True
    for row in rows:
        free, whole = torch.cuda.mem_get_info() if where.type == "cuda" else (1, 1)
        for index in [i for i in prepared if i not in row.reached and free < whole / 2]:
            del prepared[index]
        try:
            with using(kernels, row.context):
                for index in row.reached:
                    if index not in prepared:
                        prepared[index] = Prepared(shapes[index])
            time_row(row, prepared, kernels, begin + options.seconds, options.check == "all")
        except Exception as error:
            print(f"FAILED {' '.join(row.key)}: {reason_of(error)}", flush=True)
        chosen = choose(row)
        complete &= chosen is not None
        if chosen is not None:
            kernels[row.key[0]][row.key[1]] = chosen.options
        report(row, chosen)

    table = tuning.read_table(tuning.architecture(where.index))
    chosen_rows = {name: getattr(options, name) for name in ("only", "rows") if getattr(options, name)}
    command = " ".join(["python benchmarks/tune_operators.py", *(f"--{name} {value}" for name, value in chosen_rows.items())])
    tuned = {row.key[0] for row in rows}
    # Kernels whose rows were found on another machine than the table's say so there, until they are tuned again.
    elsewhere = {names: source for names, source in table.get("elsewhere", {}).items() if not tuned.issuperset(names.split(", "))}
    table = table | {
        "elsewhere": elsewhere,
        "machine": place["gpu"],
        **{k: place[k] for k in ("torch", "triton", "date")},
        "command": command,
        "kernels": kernels,
    }
    content = (json.dumps(table, indent=1) + "\n").encode()
    if where.type == "cuda":
        write_atomically(TABLES / f"{name}.json", content)
    if options.output:
        write_atomically(options.output / f"{name}.json", content)
        every = [{"kernel": r.key[0], "class": r.key[1], "context": r.context, **vars(c), "score": c.score if c.failure is None else None}
                 for r in rows for c in r.results]  # fmt: skip
        full = {**place, "command": command, "candidates": every}
        write_atomically(options.output / f"tuning_{short_name(place['gpu'])}.json", (json.dumps(full, indent=1) + "\n").encode())
    print(f"{total} candidates, {time.monotonic() - begin:.0f} s")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
