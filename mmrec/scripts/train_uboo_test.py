"""What UBÖO is worth, and the network beside others: many trainings that differ in one thing, by the same harness.

`python -m mmrec.scripts.train_uboo_test --study protocol` trains the founding document's protocol: UBÖO off, `mse` and `normalized`, three
seeds each. It writes convergence.json, a row a run, with the curves in curves_of_convergence.json and plots with bands of seeds beside it.
Rows of other runs that a file holds stay in it; the same run's is replaced.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # run by path: this folder must not stand first, and a checkout need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from mmrec.commandline.errors import BadInputError, one_line_errors
from mmrec.commandline.plain_parser import PlainParser, output_file, whole_number
from mmrec.studies.plan import SIZES, Study, quick, studies
from mmrec.studies.report import StudyFile, summary
from mmrec.studies.running import run_all, workers_for
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
    parser.add_argument("--arms", nargs="+", help="what is compared: mm-rec, transformer++, gated-deltanet, gla, overlays, joined by +")
    parser.add_argument("--size", choices=SIZES, help="the networks' size")
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds of weights and data order")
    parser.add_argument("--learning-rates", nargs="+", type=float, help="each arm is trained with each of them")
    parser.add_argument("--tokens-m", type=float, help="million tokens of a run")
    parser.add_argument("--steps", type=whole_number, help="optimiser steps of a run, instead of --tokens-m")
    parser.add_argument("--batch", type=whole_number, help="sequences of a micro-batch")
    parser.add_argument("--accumulate", type=whole_number, help="micro-batches of a step")
    parser.add_argument("--validations", type=whole_number, help="how often the loss on held-out text is taken on the way")
    parser.add_argument("--tokens-dir", type=Path, help="the folder that `prepare` wrote (default: tokens/books)")
    parser.add_argument("--workers-per-gpu", type=whole_number, default=1, help="runs side by side on a GPU; their times mean little then")
    parser.add_argument("--output", type=output_file, default=Path("convergence.json"), help="the JSON file to write")
    parser.add_argument("--quick", action="store_true", help="a minute on a CPU: a tiny network on built-in text, 60 steps, two seeds")
    parser.add_argument("--plot-only", action="store_true", help="train nothing: draw what --output holds")
    return parser


def chosen(options: argparse.Namespace, folder: Path) -> Study:
    """The study with what the options change in it."""
    study = studies()[options.study]
    if options.quick:
        study = quick(study, folder)
    elif not torch.cuda.is_available():
        raise BadInputError("no CUDA device; --quick trains tiny networks on the CPU")
    changes: dict[str, Any] = {
        "arms": tuple(options.arms) if options.arms else None,
        "size": options.size,
        "seeds": tuple(options.seeds) if options.seeds else None,
        "learning_rates": tuple(options.learning_rates) if options.learning_rates else None,
        "tokens_m": options.tokens_m,
        "steps": options.steps,
        "validations": options.validations,
    }
    study = replace(study, **{name: value for name, value in changes.items() if value is not None})
    if options.tokens_m is not None and options.steps is None:
        study = replace(study, steps=None)
    study = replace(study, batch=(options.batch or study.batch[0], options.accumulate or study.batch[1]))
    if options.tokens_dir is not None:
        study = replace(study, options=study.options | {"data.init_args.tokens_dir": str(options.tokens_dir)})
    return study


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
            file.add(*outcome)
            return f"{outcome.row['val_loss']:.4f} nats, {outcome.row['seconds']:.0f} s"

        failures: list[str] = []
        if not options.plot_only:
            failures = run_all(train, chosen(options, Path(folder)).runs(), workers_for(options.workers_per_gpu), keep)
        print(summary(file.rows))
        for line in [*file.draw(), f"rows: {file.path}", f"curves: {file.curves_path}"]:
            print(line)
        for failure in failures:
            print(f"failed: {failure}", file=sys.stderr)
        return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
