"""How fast the network is: a block forward and backward, the whole forward, tokens a second, peak memory, every layer's latency.

`python -m mmrec.scripts.real_benchmark` writes benchmark_results.json, a list of rows: the parity of one projection and six, the block,
the forward of all layers (`forward_24`), and every layer within it. Where some layers have a window, a block with one is measured beside
the one with a matrix; `memory` says which a row is of. Without a GPU a tiny network is measured, in seconds: its two layers have matrices.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run by path: this folder must not stand first, and a checkout need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from mmrec.commandline.errors import one_line_errors
from mmrec.scripts.benchmark_options import build_parser, read_settings
from mmrec.scripts.benchmark_run import Run, free_memory, run_benchmark
from mmrec.scripts.benchmark_tables import rows_table
from mmrec.scripts.measurements import build_model, draw_ids, layer_rows, model_subject


def measure(run: Run) -> None:
    """The block of each kind of memory, the whole network, its layers; HEM on."""
    settings = run.settings
    run.blocks(hem=(True,))
    if "forward" not in settings.parts:
        return
    free_memory(settings.where)
    run.say(f"building {settings.config.num_layers} layers")
    model = build_model(settings, use_hem=True)
    subject = model_subject(settings, model, draw_ids(settings))
    run.time([subject])
    run.say("layers")
    run.add(layer_rows(settings, run.place, model, subject.calls["fwd"]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print.

    Args:
        arguments: what follows the program's name; None: `sys.argv`.

    Returns:
        The exit code: 1 where parity is missed. Bad options, and sizes that do not fit the memory, end in one line and exit code 2.
    """
    parser = build_parser("real_benchmark", __doc__.splitlines()[0], "benchmark_results.json")
    with one_line_errors():
        return run_benchmark(read_settings(parser, arguments), measure, rows_table)


if __name__ == "__main__":
    sys.exit(main())
