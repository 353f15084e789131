"""`doctor`: what this machine has against what training needs, and whether the processes of a job reach each other."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveFloat, PositiveInt

from mmrec.commandline.configs import config_layers, merge
from mmrec.commandline.machine_checks import Check, run_checks
from mmrec.commandline.machine_facts import gather_facts
from mmrec.commandline.machine_needs import Plan
from mmrec.commandline.memory_estimate import errors_of, estimate
from mmrec.commandline.parser import PROGRAM, OneLineErrors
from mmrec.commandline.run_folder import RUNS, default_root

FAILED = 1  # exit code
_WIDE = 130  # columns from which notes are readable in the table; in a narrower terminal they follow it
_COLOURS = {"ok": "green", "below recommended": "yellow", "failed": "bold red", "unknown": "cyan", "not applicable": "dim"}


def build_parser() -> OneLineErrors:
    """`doctor [--config NAME] [--nodes N] [--json]`, or `doctor --distributed [--processes N] [--min_bus_bandwidth GB/s]`."""
    parser = OneLineErrors(prog=f"{PROGRAM} doctor", description="Check this machine: versions, GPU, memory, disk, network.")
    parser.add_argument("--config", type=str, help="Name or path of a config, to compare GPU memory and disk with what it needs.")
    parser.add_argument("--nodes", type=PositiveInt, help="Machines that train together; default: the config's trainer.num_nodes, or 1.")
    parser.add_argument("--json", action="store_true", help="Print JSON: the checks, and how many of them failed.")
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="Instead of the checks: an all-reduce among all processes of the job that srun or torchrun started, its result compared and "
        "its speed measured; started by itself, among as many processes as there are GPUs here.",
    )
    parser.add_argument("--processes", type=PositiveInt, help="With --distributed, started by itself: processes on this machine.")
    parser.add_argument("--min_bus_bandwidth", type=PositiveFloat, help="With --distributed: GB/s below which it fails; default: none.")
    return parser


def run(arguments: Sequence[str]) -> None:
    """Print the table, or JSON; leave with exit code 1 where a minimum is not met."""
    options = build_parser().parse_args(list(arguments))
    if options.distributed:
        _check_job(options.processes, options.min_bus_bandwidth)
        return
    content = merge(config_layers(options.config)) if options.config else {}
    plan = plan_of(options.config, content, options.nodes)
    checks = run_checks(gather_facts(_run_folder(options.config, content)), plan)
    failed = [check for check in checks if check.status == "failed"]
    if options.json:
        print(json.dumps({"checks": [asdict(check) for check in checks], "failed": len(failed)}, indent=2, ensure_ascii=False))
    else:
        _print_table(checks, plan)
    if failed:
        raise SystemExit(FAILED)


def _check_job(processes: int | None, minimum: float | None) -> None:
    from mmrec.commandline import distributed_check as check  # Lightning takes seconds to import

    try:
        fabric = check.start(processes)
        reports = check.measure(fabric)
        found = check.faults(reports, minimum)
    except RuntimeError as error:  # from torch.distributed: one does not come, or a network that breaks
        print(f"error: the processes do not reach each other: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        raise SystemExit(FAILED) from error
    if fabric.is_global_zero:
        print("\n".join(check.lines(reports)), flush=True)
        for fault in found:
            print(f"error: {fault}", file=sys.stderr, flush=True)
    if found:
        raise SystemExit(FAILED)


def plan_of(config: str | None, content: Mapping[str, Any], nodes: int | None = None) -> Plan:
    """What a config asks of a machine.

    Args:
        config: its name; None: nothing is known but `nodes`.
        content: its merged content.
        nodes: machines that train together; None: what the config says.

    Raises:
        BadInputError: a config that no network or trainer can be built from.
    """
    if config is None:
        return Plan(nodes=nodes or 1)
    with errors_of(config, content):
        needed = estimate(config, content)
        trainer = content.get("trainer") or {}
        return Plan(
            config=Path(config).stem,
            accelerator=str(trainer.get("accelerator") or "auto"),
            parameters=needed.parameters,
            memory=needed.total,
            checkpoint=needed.checkpoint,
            newest_kept=Plan.newest_kept if (kept := content.get("checkpoint_keep")) is None else int(kept),
            best_kept=bool(content.get("checkpoint_best", Plan.best_kept)),
            nodes=nodes or int(trainer.get("num_nodes") or 1),
        )


def _run_folder(config: str | None, content: Mapping[str, Any]) -> Path:
    root = (content.get("trainer") or {}).get("default_root_dir")
    return Path(root) if root else default_root([config]) if config else RUNS


def _print_table(checks: Sequence[Check], plan: Plan) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:  # piped: as wide as the table is, not as 80 columns
        console = Console(width=200)
    wide = console.width >= _WIDE
    table = Table(title=f"This machine, for {plan.config}" if plan.config else "This machine")
    for title in ("check", "found", "minimum", "recommended", "status", *(["note"] if wide else [])):
        table.add_column(title, overflow="fold")
    below: dict[tuple[str, str], list[str]] = {}
    for check in checks:
        status, note = f"[{_COLOURS[check.status]}]{check.status}[/]", check.note
        if check.status == "failed" or (not wide and check.status in ("below recommended", "unknown")):
            below.setdefault((status, note), []).append(check.name)
            note = "see below"
        cells = [escape(text) for text in (check.name, check.found, check.minimum, check.recommended)]
        table.add_row(*cells, status, *([escape(note)] if wide else []))
    console.print(table)
    for (status, note), names in below.items():
        console.print(f"{status} {escape(', '.join(names))}: {escape(note)}", soft_wrap=True)
