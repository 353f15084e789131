"""What UBÖO is worth, and the network beside others: many trainings that differ in one thing, by the same harness.

`python -m mmrec.scripts.train_uboo_test --study protocol` trains the founding document's protocol: UBÖO off, `mse` and `normalized`, three
seeds each. It writes convergence.json, a row a run, with the curves in curves_of_convergence.json and plots with bands of seeds beside it.
Rows of other runs that a file holds stay in it; the same run's is replaced.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run by path: this folder must not stand first, and a checkout need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from mmrec.commandline.errors import one_line_errors
from mmrec.commandline.plain_parser import PlainParser, output_file
from mmrec.studies.options import add_study_options, changed, require_gpu
from mmrec.studies.plan import Study, quick, studies
from mmrec.studies.report import StudyFile, summary
from mmrec.studies.running import Plan, carry_out, finish
from mmrec.studies.training import Outcome, train


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    known = studies()
    parser = PlainParser(
        prog="train_uboo_test",
        description=__doc__.splitlines()[0],
        epilog="; ".join(f"{name}: {study.what}" for name, study in known.items()),
    )
    parser.add_argument("--study", choices=list(known), default="protocol", help="which study (default: protocol); see below")
    add_study_options(parser)
    parser.add_argument(
        "--output", type=output_file, default=Path("convergence.json"), help="the JSON file to write (default: convergence.json)"
    )
    parser.add_argument("--quick", action="store_true", help="half a minute on a CPU: tiny networks on built-in text, 60 steps, two seeds")
    return parser


def chosen(options: argparse.Namespace, folder: Path) -> Study:
    """The study with what the options change in it."""
    study = studies()[options.study]
    if options.quick:
        return changed(quick(study, folder), options)
    require_gpu()
    return changed(study, options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, write, draw, print.

    Args:
        arguments: what follows the program's name; None: `sys.argv`.

    Returns:
        The exit code: 1 where a run failed. Bad options end in one line and exit code 2.
    """
    parser = build_parser()
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        options = parser.parse_args(arguments)
        file = StudyFile(options.output)

        def keep(outcome: Outcome) -> str:
            file.add(outcome.row | {"side_by_side": options.workers_per_gpu}, outcome.curves)
            return f"{outcome.row['val_loss']:.4f} nats, {outcome.row['seconds']:.0f} s"

        def plan() -> Plan:
            return Plan(train, chosen(options, Path(folder)).runs(), lambda run: [run.description()])

        failures = carry_out(options, file, plan, keep)
        return finish([summary(file.rows), *file.draw(), f"rows: {file.path}", f"curves: {file.curves_path}"], failures)


if __name__ == "__main__":
    sys.exit(main())
