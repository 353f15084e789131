"""What HEM saves: a block and the whole forward with six projections and with one, beside the same matrix products alone.

`python -m mmrec.scripts.benchmark_hem` writes hem_benchmark.json, a list of rows, off and on for each thing timed: a block with a matrix,
where the network has such layers one with a window (`memory` says which), the network. `launches` are the kernels of the projections in a
forward, counted by torch.profiler (on a CPU their matrix products); `bytes` is arithmetic, `bytes_ncu` is what NVIDIA's profiler read, or
null with its reason. Off is the founding document's: six projections, and everything around them but the recurrences and the attention of
a window in plain PyTorch; `block_six_gemms_fused_rest` is between the two: six projections, the rest as with HEM on.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run by path: this folder must not stand first, and a checkout need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from mmrec.commandline.errors import one_line_errors
from mmrec.scripts.benchmark_options import build_parser, read_settings
from mmrec.scripts.benchmark_run import Run, free_memory, run_benchmark
from mmrec.scripts.benchmark_tables import hem_table
from mmrec.scripts.measurements import build_model, draw_ids, fuse_all, model_subject, with_eager_rest, with_reductions


def measure(run: Run) -> None:
    """The blocks in their three forms in turn; then the whole network with six projections, and the same one fused."""
    settings = run.settings
    run.blocks(hem=(False, True))
    if "forward" not in settings.parts:
        return
    free_memory(settings.where)
    run.say(f"building {settings.config.num_layers} layers")
    model, input_ids = build_model(settings, use_hem=False), draw_ids(settings)
    run.time([with_eager_rest(model_subject(settings, model, input_ids))])
    fuse_all(model)
    free_memory(settings.where)
    run.time([model_subject(settings, model, input_ids)])
    with_reductions(run.rows)
    run.add([])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print.

    Args:
        arguments: what follows the program's name; None: `sys.argv`.

    Returns:
        The exit code: 1 where parity is missed. Bad options, and sizes that do not fit the memory, end in one line and exit code 2.
    """
    parser = build_parser("benchmark_hem", __doc__.splitlines()[0], "hem_benchmark.json")
    parser.add_argument("--ncu", action="store_true", help="also read the projections' memory traffic with ncu, where it is installed")
    with one_line_errors():
        return run_benchmark(read_settings(parser, arguments), measure, hem_table)


if __name__ == "__main__":
    sys.exit(main())
