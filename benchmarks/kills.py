"""Training runs killed by SIGKILL at random moments, and resumed: do they end as a run that nothing befell?

`python benchmarks/kills.py --kills 25 --output FILE.json`, on a CPU. Each run is a process of `fit` with a checkpoint every second step,
so that most of its time is spent with one being written; every third run writes without a thread of its own. A kill comes at a moment
drawn from the time an undisturbed run takes, every second one only when a half-written file is seen. After it every checkpoint under a
final name must be whole, and `--ckpt_path last` must lead to the undisturbed run's last step with the same parameters, optimiser, random
states and place in the data, to the bit. Exit code 1 where one does not. A kill that leaves the last step's checkpoint, so that nothing
would be resumed, does not count: another moment is drawn.
"""

import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

# Imported here, before any run is forked: each would take seconds for it.
import mmrec.commandline.trainer_cli  # noqa: F401
from mmrec.checkpoint_files import LAST
from mmrec.cli import main as cli
from mmrec.commandline.plain_parser import PlainParser, output_file, whole_number
from mmrec.files import TEMPORARY_SUFFIX, read_checkpoint, write_atomically
from mmrec.measuring.machine import device, machine, software

COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "random_states", "tokens_seen", "global_step", "loops")
POLL_SECONDS = 0.001
PATIENCE_SECONDS = 120.0

Row = dict[str, Any]


def config(steps: int, cache: Path) -> dict[str, Any]:
    """A run of `steps` steps of two micro-batches, some ten megabytes of state, validated also in the middle of a step."""
    return {
        "seed_everything": 1,
        "checkpoint_every": 2,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": steps,
            "accumulate_grad_batches": 2,
            "val_check_interval": 7,
            "log_every_n_steps": 1,
            "enable_model_summary": False,
        },
        "model": {
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "network": {"vocab_size": 300, "model_dim": 192, "num_layers": 2, "num_heads": 2},
        },
        "data": {
            "class_path": "datamodules.C4DataModule",
            "init_args": {
                "source": "sample",
                "vocab_size": 300,
                "seq_len": 32,
                "batch_size": 2,
                "validation_batches": 1,
                "cache_dir": str(cache),
            },
        },
        "disable_callbacks": ["memory_profile", "step_latency"],
    }


def start(arguments: Sequence[str], log: Path) -> int:
    """Run a command in a process of its own; its id."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        cli(arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def finish(arguments: Sequence[str], log: Path) -> None:
    """Run a command to its end.

    Raises:
        RuntimeError: it fails.
    """
    _, status = os.waitpid(start(arguments, log), 0)
    if status:
        raise RuntimeError(f"{' '.join(arguments)} ended with status {status}:\n{log.read_text()[-3000:]}")


def half_written(folder: Path) -> bool:
    """Whether a checkpoint lies there that has not got its name yet."""
    return any(folder.glob(f".*{TEMPORARY_SUFFIX}"))


def kill_once(arguments: Sequence[str], run: Path, delay: float, aimed: bool) -> float | None:
    """Start a run and kill it `delay` seconds after its first checkpoint, or then as soon as one is being written.

    Returns:
        How many seconds after its first checkpoint it was killed; None where it had ended by then.
    """
    folder = run / "checkpoints"
    process = start(arguments, run.with_suffix(".log"))
    begun = time.monotonic()
    first: float | None = None
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            if status:
                raise RuntimeError(f"the run ended with status {status}:\n{run.with_suffix('.log').read_text()[-3000:]}")
            return None
        now = time.monotonic()
        if first is None and (folder / LAST).exists():
            first = now
        due = first is not None and now - first >= delay
        if due and (not aimed or half_written(folder)):
            os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            return now - first if first is not None and os.WIFSIGNALED(status) else None
        if now - begun > PATIENCE_SECONDS:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise RuntimeError(f"no moment to kill it came within {PATIENCE_SECONDS:.0f} s:\n{run.with_suffix('.log').read_text()[-3000:]}")
        time.sleep(POLL_SECONDS)


def same(one: Any, other: Any) -> bool:
    """Whether two values of tensors and plain types are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def unreadable(folder: Path) -> list[str]:
    """Names of checkpoints that cannot be read."""
    found = []
    for path in sorted(folder.glob("*.ckpt")):
        try:
            read_checkpoint(path, mmap=True)
        except ValueError:
            found.append(path.name)
    return found


def killed_run(number: int, options: Namespace, folder: Path, span: float, drawn: random.Random) -> Row:
    """Kill a run, resume it, and compare it with the undisturbed one."""
    in_background, aimed = number % 3 != 2, number % 2 == 1
    base = ["fit", "--config", str(folder / "run.yaml"), "--checkpoint_async", str(in_background).lower()]
    for attempt in itertools.count():
        run = folder / f"killed_{number}_{attempt}"
        checkpoints, arguments = run / "checkpoints", [*base, "--trainer.default_root_dir", str(run)]
        after = kill_once(arguments, run, drawn.uniform(0.0, span), aimed)
        if after is None:  # a moment after the end is none
            continue
        row: Row = {"kill": number, "checkpoint_async": in_background, "seconds_after_first_checkpoint": round(after, 3)}
        row |= {"while_writing": half_written(checkpoints), "unreadable": unreadable(checkpoints)}
        row["resumed_from_step"] = read_checkpoint(checkpoints / LAST, mmap=True)["global_step"]
        if row["resumed_from_step"] < options.steps or row["unreadable"]:
            break
    finish([*arguments, "--ckpt_path", "last"], run.with_suffix(".log"))
    undisturbed, resumed = (read_checkpoint(where / "checkpoints" / LAST) for where in (folder / "straight", run))
    row["different"] = [name for name in COMPARED if not same(undisturbed[name], resumed[name])]
    row["identical"] = not row["different"] and not row["unreadable"]
    return row


def measure(options: Namespace, folder: Path) -> dict[str, Any]:
    """The undisturbed run, then the kills."""
    (folder / "run.yaml").write_text(yaml.safe_dump(config(options.steps, folder / "sample")))
    straight = folder / "straight"
    fit = ["fit", "--config", str(folder / "run.yaml"), "--trainer.default_root_dir", str(straight)]
    process, begun = start(fit, straight.with_suffix(".log")), None
    while not (ended := os.waitpid(process, os.WNOHANG))[0]:
        if begun is None and (straight / "checkpoints" / LAST).exists():
            begun = time.monotonic()
        time.sleep(POLL_SECONDS)
    if ended[1] or begun is None:
        raise RuntimeError(f"the undisturbed run ended with status {ended[1]}:\n{straight.with_suffix('.log').read_text()[-3000:]}")
    span = time.monotonic() - begun  # from its first checkpoint to its end
    files = sorted((straight / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    drawn = random.Random(options.seed)  # None: from the system
    rows = []
    for number in range(options.kills):
        rows.append(killed_run(number, options, folder, 0.8 * span, drawn))
        print(json.dumps(rows[-1]), flush=True)
    return {
        **machine(device()),
        **software(),
        "steps": options.steps,
        "checkpoint_mib": round(files[-1].stat().st_size / 2**20, 1),
        "seconds_undisturbed": round(span, 2),
        "kills": len(rows),
        "while_writing": sum(row["while_writing"] for row in rows),
        "identical": sum(row["identical"] for row in rows),
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Kill, resume, compare; write JSON.

    Args:
        arguments: what follows the program's name; None: `sys.argv`.
    """
    parser = PlainParser(description=__doc__)
    parser.add_argument("--kills", type=whole_number, default=25, help="how many (default 25)")
    parser.add_argument("--steps", type=whole_number, default=40, help="optimiser steps of a run (default 40)")
    parser.add_argument("--seed", type=int, help="of the moments; default: other moments each time")
    parser.add_argument("--output", type=output_file, required=True, help="the JSON file to write")
    options = parser.parse_args(arguments)
    if options.steps < 3:
        parser.error(f"--steps is {options.steps}, and the first checkpoint is of step 2; give at least 3")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mmrec-kills-") as folder:
        result = measure(options, Path(folder))
    write_atomically(options.output, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    print(f"{result['identical']} of {result['kills']} identical, {result['while_writing']} killed while writing: {options.output}")
    if result["identical"] != result["kills"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
