"""The frame of a benchmark: seed, room, progress, rows written as they come, verdict on the parity, exit code."""

from collections.abc import Callable
from dataclasses import replace

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mmrec.commandline.errors import BadInputError
from mmrec.commandline.sheets import Sheet, show
from mmrec.measuring.machine import machine
from mmrec.measuring.results import read_rows, write_rows
from mmrec.scripts.benchmark_options import Settings
from mmrec.scripts.device_memory import needed_bytes, require_room, too_large
from mmrec.scripts.hem_parity import block_pair
from mmrec.scripts.measurements import FUSED_REST, Row, Subject, block_subject, draw, parity_row, rows_of, timings_count, with_eager_rest

_ROOM = 0.8  # of what was asked for: what a smaller size may need once that has run out of memory


class Run:
    """One benchmark under way.

    Attributes:
        settings: what is measured.
        place: what every row carries of the machine and the day.
        rows: what was measured, written to the output whenever some are added.
    """

    def __init__(self, settings: Settings, progress: Progress) -> None:
        self.settings = settings
        self.place = machine(settings.where) | {"command": settings.command, "windows": settings.config.num_windows}
        self.rows: list[Row] = []
        self._earlier = read_rows(settings.output) if settings.append and settings.output.exists() else []
        self._progress = progress
        self._task = progress.add_task("parity", total=None)

    def add(self, rows: list[Row]) -> None:
        """Keep rows, and write all there are, behind those of earlier runs where they are to stay."""
        self.rows += rows
        write_rows(self.settings.output, [*self._earlier, *self.rows])

    def time(self, subjects: list[Subject]) -> None:
        """Time subjects against each other and keep their rows."""
        self._progress.reset(self._task, total=timings_count(self.settings, subjects))
        self.add(rows_of(self.settings, self.place, subjects, self._advance))

    def say(self, what: str) -> None:
        """Show what is being done where there is nothing to count."""
        self._progress.update(self._task, description=what)

    def blocks(self, hem: tuple[bool, ...]) -> None:
        """Parity of a block with HEM off and on, for each kind of memory; then, if asked for, the times of those forms that `hem` names.

        With HEM off a block is timed twice: with everything around the projections eager, and with it fused as with HEM on. Blocks with a
        matrix and with a window are timed against each other.
        """
        settings = self.settings
        x, cotangent = draw(settings)
        subjects: list[Subject] = []
        for layer_index in settings.first_layers.values():
            pair = block_pair(settings.config, settings.where, settings.dtype, layer_index)
            self.add([parity_row(settings, self.place, pair, x, cotangent)])
            if "block" in settings.parts:
                forms = [block_subject(settings, block, x, cotangent) for block in pair if block.use_hem in hem]
                if not forms[0].hem:
                    forms = [with_eager_rest(forms[0]), replace(forms[0], what=f"block{FUSED_REST}"), *forms[1:]]
                subjects += forms
        if subjects:
            self.time(subjects)

    def _advance(self, what: str) -> None:
        self._progress.update(self._task, advance=1, description=what)


def run_benchmark(settings: Settings, measure: Callable[[Run], None], table: Callable[[list[Row]], Sheet]) -> int:
    """Measure, write, print.

    Args:
        settings: what is measured.
        measure: does it, and adds its rows to the run.
        table: shows them.

    Returns:
        The exit code: 1 where one projection and six are not the same function to the limit of the precision.

    Raises:
        BadInputError: where the device's memory is not enough, or rows are to be added to a file that holds none.
    """
    where = settings.where
    if where.type == "cuda":
        torch.cuda.set_device(where)
    require_room(settings)
    torch.manual_seed(0)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        run = Run(settings, progress)
        print(_heading(run), flush=True)
        try:
            measure(run)
        except torch.OutOfMemoryError as error:
            smaller = int(_ROOM * needed_bytes(settings))
            raise BadInputError(too_large(settings, f"ran out of the memory of {where}", smaller)) from error
    show(table(run.rows))
    _say_why_uncounted(run)
    code = _verdict(run)
    print(settings.output)
    return code


def free_memory(where: torch.device) -> None:
    """Give what is no longer used back to the device, so that the next part is not built into its gaps."""
    if where.type == "cuda":
        torch.cuda.empty_cache()


def _heading(run: Run) -> str:
    config, settings, place = run.settings.config, run.settings, run.place
    machine_line = f"{place['gpu']}, torch {place['torch']}, triton {place['triton']}, {place['date']}"
    widths = f"D {config.model_dim}, H {config.heads}, P {config.pe_width}, F {config.ffn_width}"
    sizes = f"{widths}, L {config.num_layers}, V {config.vocab_size}; B {settings.batch}, T {settings.seq_len}"
    uboo = "on" if config.use_uboo else "off"
    layers = f"{config.num_windows} of {config.num_layers} layers" if config.num_windows else "no layer"
    windows = f"a window of {config.window} tokens in {layers}"
    return f"{machine_line}\n{sizes}; {settings.precision}, UBÖO {uboo}; {settings.repeat} rounds\n{windows}"


def _say_why_uncounted(run: Run) -> None:
    """Print why ncu, though asked for, counted nothing."""
    forwards = [row for row in run.rows if row["what"] == "block" and row["direction"] == "fwd"]
    for reason in sorted({row["bytes_ncu_reason"] for row in forwards if row.get("bytes_ncu_reason")} if run.settings.ncu else ()):
        print(f"no bytes by ncu: {reason}")


def _verdict(run: Run) -> int:
    """Print what parity found, block by block; the exit code."""
    checked = [row for row in run.rows if row["what"] == "parity"]
    for found in checked:
        for name in found["missed"]:
            against = f"one projection against six, block with a {found['memory']}"
            print(f"PARITY MISS: {name}: {found['errors'][name]:.2e} > {_limit(found, name):.0e}, {against}")
        counts = f"{len(found['errors'])} tensors, {len(found['missed'])} missed"
        largest = f"largest error {found['largest']:.1e} of {_limit(found, found['of']):.0e}, {found['of']}"
        print(f"parity of one projection and six, block with a {found['memory']}: {counts}\n  {largest}")
    return 1 if any(found["missed"] for found in checked) else 0


def _limit(found: Row, name: str) -> float:
    limit: float = found["limits"].get(name, found["limit"])
    return limit
