"""Weak scaling: the same batch on each GPU of one host, on one, two and more of them, with everything on each or in shards.

`python benchmarks/scaling.py --config h100_370m --gpus 1 2 4` writes benchmarks/results/scaling_<gpu>.json, a row a strategy and number of
GPUs; rows of others stay. `--config h100_7b --strategy ddp fsdp2 --gpus 4` compares the two. `--quick` tries the script on two processes of
a CPU. Every point has processes of its own; one that fails leaves a row with the reason, and makes the exit code 1.

A step is the config's: its precision, optimiser, batch and accumulated micro-batches, of random tokens; but no CUDA graph, which with
several GPUs there is not, so that one GPU and several take the same step. On one GPU there is no strategy, whatever it is called.

`ddp` is TunedDDPStrategy, with the config's options where the config names it, else with `static_graph` and gradients in the buckets they
are sent in. A config's `strategy: auto` or `ddp` is in `fit` Lightning's own DDP without either: what is measured here is had there by
`--trainer.strategy lightning_modules.strategies.TunedDDPStrategy --trainer.strategy.static_graph true`. A row says which class and options.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from train_step import RESULTS, Row, end_with
from train_step_cases import OWN, Case, check_settings

from mmrec.commandline.configs import config_layers, merge
from mmrec.commandline.errors import one_line_errors
from mmrec.commandline.plain_parser import PlainParser, command_line, output_file, seconds, whole_number
from mmrec.measuring.failures import reason_of
from mmrec.measuring.machine import device, machine, short_name
from mmrec.measuring.results import read_rows, write_rows

PROGRAM = "python benchmarks/scaling.py"
STRATEGIES = ("ddp", "fsdp2")
OWN_HERE = OWN | {
    "accumulate_grad_batches": "give --accumulate", "devices": "give --gpus", "num_nodes": "it measures one host",
    "strategy": "give --strategy", "use_distributed_sampler": "",
}  # fmt: skip
QUICK = ["--config", "cpu_tiny", "--gpus", "1", "2", "--strategy", *STRATEGIES, "--steps", "2", "--warmup", "1", "--batch", "2"]
# What a row is compared at.
SAME = (
    "config", "B", "T", "accumulate", "precision", "optimizer", "checkpointing", "set", "gpu", "torch", "triton",
)  # fmt: skip


def work(task: dict[str, Any]) -> NoReturn:
    """Train as one of a point's ranks and write what it saw where the task says; ends the process."""
    threading.Thread(target=end_with, args=(task["parent"],), daemon=True).start()
    try:
        from scaling_worker import run

        answer = run(Case(**task["case"]), task["batch"], task["strategy"], task["gpus"], task["gradients"])
    except Exception as error:
        import traceback

        traceback.print_exc()
        answer = {"failed": reason_of(error)}
    write_rows(Path(task["answers"]) / f"{os.environ['RANK']}.json", [answer])
    sys.stdout.flush()
    os._exit(1 if "failed" in answer else 0)  # at once: the libraries' own end may wait for a rank that waits for this one, or crash


def measure(task: dict[str, Any], limit: float) -> list[dict[str, Any]]:
    """What each rank of a point says; one answer with `failed` where one of them has none, which ends the others."""
    with tempfile.TemporaryDirectory() as folder:
        task = task | {"answers": folder, "parent": os.getpid()}
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(task)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(task["gpus"]), "NODE_RANK": "0"}
        ranks = range(task["gpus"])
        environments = [os.environ | job | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in ranks]
        processes = [subprocess.Popen(command, env=environment) for environment in environments]
        end = time.monotonic() + limit
        try:
            while any(process.poll() is None for process in processes) and time.monotonic() < end:
                ended = [rank for rank in ranks if processes[rank].poll() is not None]
                if any("failed" in (_answer(Path(folder), rank) or {"failed": "without a word"}) for rank in ended):
                    break
                time.sleep(0.1)
            codes = [process.poll() for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return judged([_answer(Path(folder), rank) for rank in ranks], codes, limit)


def _answer(folder: Path, rank: int) -> dict[str, Any] | None:
    path = folder / f"{rank}.json"
    return read_rows(path)[0] if path.exists() else None


def judged(answers: Sequence[dict[str, Any] | None], codes: Sequence[int | None], limit: float) -> list[dict[str, Any]]:
    """The answers of a point's ranks, or one with `failed`: what ranks say went wrong, then who died without a word.

    A rank that has answered and then ends badly, as in a library's teardown, takes nothing from the answer: it says so under `exit_codes`.

    Args:
        answers: by rank; None where there is none.
        codes: exit codes by rank; None of a process that had to be ended.
        limit: seconds that there were.
    """
    said: dict[str, int] = {}  # a reason, and the first rank that gives it
    for rank, answer in enumerate(answers):
        if answer and "failed" in answer:
            said.setdefault(answer["failed"], rank)
    causes = [f"rank {rank}: {reason}" for reason, rank in said.items()]
    died = [
        f"rank {rank}: its process died (exit code {code})"
        for rank, (answer, code) in enumerate(zip(answers, codes, strict=True))
        if answer is None and code is not None
    ]
    given = [answer for answer in answers if answer is not None]
    if causes or died:
        return [{"failed": "; ".join(causes + died)}]
    if len(given) < len(answers):
        return [{"failed": f"no answer within {limit:.0f} s"}]
    return [answer | {"exit_codes": list(codes)} for answer in given] if any(codes) else given


def joined(answers: Sequence[dict[str, Any]]) -> Row:
    """One row of all ranks: a step takes as long as the slowest says; the memory is the fullest GPU's.

    What communication takes is the rank's that waited least for the others in it.
    """
    first, worst = answers[0], max(answers, key=lambda answer: answer["ms_per_step"])
    tokens = first["B"] * first["T"] * first["accumulate"] / worst["ms_per_step"] * 1e3
    peak = first.pop("flops_peak")
    times = {name: worst[name] for name in ("ms_per_step", "ms_fastest", "ms_slowest")}
    sent = min(answers, key=lambda answer: answer.get("communication_ms", 0.0))
    times |= {name: value for name, value in sent.items() if name.startswith("communication_")}
    return first | times | {
        "tokens_per_s": tokens * len(answers),
        "tokens_per_s_per_gpu": tokens,
        "mfu": None if peak is None else tokens * first["flops_per_token"] / peak,
        "peak_gib": max(answer["peak_gib"] for answer in answers),
        "peak_gib_by_gpu": [answer["peak_gib"] for answer in answers],
        **{name: max((a[name] for a in answers if a[name] is not None), default=None) for name in ("reserved_gib", "in_use_gib")},
    }  # fmt: skip


def with_efficiency(rows: Sequence[Row]) -> None:
    """Enter how many tokens a second a GPU reads, against one alone at the same settings; None where one alone was not measured."""
    alone = {tuple(str(row.get(name)) for name in SAME): row for row in rows if row["gpus"] == 1 and row.get("tokens_per_s_per_gpu")}
    for row in rows:
        base = alone.get(tuple(str(row.get(name)) for name in SAME))
        if row.get("tokens_per_s_per_gpu"):
            row["efficiency"] = None if base is None else row["tokens_per_s_per_gpu"] / base["tokens_per_s_per_gpu"]


def line(row: Row) -> str:
    """A row for the terminal."""
    heading = f"{row['config']}, {row['strategy']} on {row['gpus']}"
    if "failed" in row:
        return f"{heading}: NOT MEASURED: {row['failed']}"
    forms = {
        "tokens_per_s_per_gpu": "{:,.0f} tokens/s a GPU", "efficiency": "{:.1%} of one alone", "ms_per_step": "{:.2f} ms a step",
        "mfu": "MFU {:.1%}", "peak_gib": "peak {:.2f} GiB", "communication_ms": "{:.1f} ms of communication",
        "communication_hidden": "{:.0%} of it behind the rest", "exit_codes": "processes that ended badly after it: exit codes {}",
    }  # fmt: skip
    said = [form.format(row[name]) for name, form in forms.items() if row.get(name) is not None]
    return f"{heading}: " + ", ".join(said)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `cases` has the config as each strategy trains it."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = PlainParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="h100_370m", help="name or path of a config")
    parser.add_argument("--gpus", type=whole_number, nargs="+", default=[1], help="numbers of GPUs, one after the other")
    parser.add_argument("--strategy", choices=STRATEGIES, nargs="+", default=["ddp"], help="with everything on each GPU, or in shards")
    parser.add_argument("--gradients", choices=("full", "bf16"), help="in what gradients are summed over the GPUs; the config's")
    parser.add_argument("--steps", type=whole_number, default=20, help="steps under the clock")
    parser.add_argument("--warmup", type=whole_number, default=5, help="steps before the clock")
    parser.add_argument("--batch", type=whole_number, help="sequences of a micro-batch; the config's")
    parser.add_argument("--accumulate", type=whole_number, help="micro-batches of a step; the config's")
    parser.add_argument("--set", action="append", default=[], help="network.NAME=VALUE, model.… or trainer.…")
    parser.add_argument("--output", type=output_file, help="the JSON file; benchmarks/results/scaling_<gpu>.json")
    parser.add_argument("--seconds", type=seconds, default=580.0, help="the longest that a point may take")
    parser.add_argument("--quick", action="store_true", help="two processes of a CPU and a tiny network, to try the script")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args([*QUICK, *given] if "--quick" in given else given)
    if options.worker:
        return options
    here = torch.cuda.device_count()
    if not options.quick and here == 0:
        parser.error("no CUDA device; --quick tries the script on a CPU")
    if not options.quick and max(options.gpus) > here:
        parser.error(f"--gpus: {max(options.gpus)} are wanted, {here} are here")
    with one_line_errors():
        content = merge(config_layers(options.config))
    data, trainer = (content.get("data") or {}).get("init_args") or {}, content.get("trainer") or {}
    options.batch = options.batch or int(data.get("batch_size", 8))
    case = Case(
        name="scaling",
        what="weak scaling",
        config=options.config,
        seq_len=32 if options.quick else int(data.get("seq_len", 2048)),
        accumulate=options.accumulate or int(trainer.get("accumulate_grad_batches", 1)),
        model={"cuda_graph": False},
        warmup=options.warmup,
        steps=options.steps,
    )
    try:
        options.case = case.changed(options.set)
        check_settings(options.case, ["all"], OWN_HERE)
    except ValueError as error:
        parser.error(f"--set: {error}" if options.set else str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write.

    Args:
        arguments: what follows the program's name; None: `sys.argv`.

    Returns:
        The exit code: 1 where a point could not be measured.
    """
    options = parse(arguments)
    if options.worker:
        work(json.loads(options.worker))
    from scaling_worker import options_for  # Lightning takes seconds to import

    place, command = machine(device()), command_line(PROGRAM, arguments)
    output = options.output or RESULTS / f"scaling_{short_name(place['gpu'])}.json"
    print(f"{place['gpu']}, torch {place['torch']}, triton {place['triton']}, {place['date']}", flush=True)
    with one_line_errors():
        rows: list[Row] = read_rows(output) if output.exists() else []
    failed, done = False, set()
    for strategy in options.strategy:
        for gpus in options.gpus:
            name = strategy if gpus > 1 else "single_device"
            if (name, gpus) in done:
                continue
            done.add((name, gpus))
            task = {"case": vars(options.case), "batch": options.batch, "strategy": name, "gpus": gpus, "gradients": options.gradients}
            answers = measure(task, options.seconds)
            what = {"config": options.config, "strategy": name, "gpus": gpus, "B": options.batch, "T": options.case.seq_len}
            chosen = options_for(options.case, name, options.gradients)
            what |= {"accumulate": options.case.accumulate, "set": options.set, "strategy_options": chosen}
            what |= {"gradients_sent": chosen.get("gradients")}
            found = what | (answers[0] if "failed" in answers[0] else joined(answers)) | place | {"command": command}
            failed |= "failed" in found
            key = ("config", "strategy", "gpus", "B", "T", "accumulate", "set", "gradients_sent", "gpu")
            rows = [row for row in rows if any(row.get(part) != found.get(part) for part in key)] + [found]
            with_efficiency(rows)
            print(line(found), flush=True)
            write_rows(output, rows)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
