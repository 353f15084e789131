"""How large a state must be to recall: accuracy of multi-query associative recall against bytes of state a sequence.

`python -m mmrec.scripts.recall_curve` trains MM-Rec networks of two layers, of several widths and heads, and Transformer++ beside them,
each with three learning rates, on 64 pairs in 512 tokens. It writes recall_<gpu>.json, a row a run, and recall_<gpu>.png; the table shows
each network with its best learning rate. Rows of other runs that the file holds stay in it; the same run's is replaced.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # run by path: this folder must not stand first, and a checkout need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from mmrec.commandline.errors import one_line_errors
from mmrec.commandline.plain_parser import PlainParser, output_file, whole_number
from mmrec.measuring.machine import device, device_name, short_name
from mmrec.studies.options import add_common_options, require_gpu
from mmrec.studies.recall import IDENTITY, RecallStudy, description, measure
from mmrec.studies.recall_report import draw, table
from mmrec.studies.row_file import RowFile
from mmrec.studies.running import Plan, carry_out, finish
from mmrec.studies.runs import Row

_WORKERS = 4  # networks so small leave most of a GPU to others
_SIDES = ("seq_len", "num_pairs", "vocab_size", "validation_examples")
_QUICK = RecallStudy(
    widths=(32,),
    head_widths=(16, 32),
    learning_rates=(1e-2,),
    steps=200,
    batch=32,
    task={"seq_len": 16, "num_pairs": 2, "vocab_size": 16, "validation_examples": 256},
    options={"model.cuda_graph": False, "trainer.precision": "32-true", "model.network.ffn_dim": 64},
)


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = PlainParser(prog="recall_curve", description=__doc__.splitlines()[0])
    add_common_options(parser, _WORKERS)
    parser.add_argument("--widths", nargs="+", type=whole_number, help="D of the networks (default: 64 128 256 512)")
    parser.add_argument("--head-widths", nargs="+", type=whole_number, help="D/H, of those that divide D (default: 64 128 256)")
    parser.add_argument("--seq-len", type=whole_number, help="tokens of an example (default: 512)")
    parser.add_argument("--num-pairs", type=whole_number, help="keys and values of an example (default: 64)")
    parser.add_argument("--vocab-size", type=whole_number, help="number of tokens (default: 8192)")
    parser.add_argument("--validation-examples", type=whole_number, help="how many are judged (default: 1024)")
    parser.add_argument("--output", type=output_file, help="the JSON file to write (default: recall_<gpu>.json)")
    parser.add_argument("--quick", action="store_true", help="half a minute on a CPU: tiny networks, 2 pairs in 16 tokens")
    return parser


def chosen(options: argparse.Namespace) -> RecallStudy:
    """The study with what the options change in it."""
    if options.quick:
        study = _QUICK
    else:
        require_gpu()
        study = RecallStudy()
    several = ("arms", "widths", "head_widths", "learning_rates", "seeds")
    changes: dict[str, Any] = {name: tuple(getattr(options, name)) for name in several if getattr(options, name)}
    changes |= {name: getattr(options, name) for name in ("steps", "batch") if getattr(options, name)}
    task = {name: getattr(options, name) for name in _SIDES if getattr(options, name)}
    return replace(study, **changes, task={**study.task, **task})


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, write, draw, print.

    Args:
        arguments: what follows the program's name; None: `sys.argv`.

    Returns:
        The exit code: 1 where a run failed. Bad options end in one line and exit code 2.
    """
    parser = build_parser()
    with one_line_errors():
        options = parser.parse_args(arguments)
        file = RowFile(options.output or Path(f"recall_{short_name(device_name(device()))}.json"), IDENTITY)

        def keep(row: Row) -> str:
            file.put([row])
            file.write()
            return f"{100 * row['accuracy']:.2f} % of the answers with {row['state_bytes']:,} bytes, {row['seconds']:.0f} s"

        failures = carry_out(options, file, lambda: Plan(measure, chosen(options).runs(), lambda run: [description(run)]), keep)
        return finish([table(file.rows), *draw(file.path.with_suffix(".png"), file.rows), f"rows: {file.path}"], failures)


if __name__ == "__main__":
    sys.exit(main())
