"""The files of a study: rows, curves, plots; and its table for the screen."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmrec.files import write_atomically
from mmrec.measuring.machine import short_name
from mmrec.measuring.results import finite, read_rows
from mmrec.studies.row_file import RowFile, arm_name, grouped
from mmrec.studies.runs import IDENTITY, Row
from mmrec.studies.statistics import steps_to

Curves = dict[str, list[list[float]]]
# What a study's runs are compared with: the Transformer in the finals, else the network as its config has it, without UBÖO.
_AGAINST: dict[str, dict[str, Any]] = {"finalist": {"model": "transformer++"}}
_NETWORK = {"model": "mm-rec", "variant": None, "uboo": "off"}
# Runs that agree in these are compared.
_SETTING = ("study", "size", "trained_on", "seq_len", "batch_tokens", "steps", "gpu")


class StudyFile(RowFile):
    """Rows and curves of a convergence study on disk.

    Args:
        path: of the rows; the curves lie beside it. What is there already is read.

    Raises:
        ValueError: a file that holds no rows.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, IDENTITY)
        self.curves_path = path.with_name(f"curves_of_{path.name}")
        self._curves: dict[tuple[Any, ...], Curves] = {}
        if self.curves_path.is_file():
            self._curves = {self.identity(entry): entry["curves"] for entry in read_rows(self.curves_path)}

    def add(self, row: Row, curves: Any) -> None:
        """Add a run's row and curves, in the place of those of the same run, and write both files."""
        self.put([row])
        self._curves[self.identity(row)] = {tag: [list(point) for point in points] for tag, points in curves.items()}
        self._compare()
        self.write()

    def write(self) -> None:
        """Both files, each whole or not at all; the curves first, as a row says that its run need not be trained again."""
        entries = []
        for row in self.rows:
            if self.identity(row) in self._curves:
                entry = {name: row.get(name) for name in IDENTITY} | {"curves": self._curves[self.identity(row)]}
                entries.append(json.dumps(finite(entry), allow_nan=False))
        write_atomically(self.curves_path, ("[\n" + ",\n".join(entries) + "\n]\n").encode())
        super().write()

    def curve(self, row: Row, tag: str) -> list[tuple[int, float]]:
        """One of a row's curves, up to where it is no longer finite; empty where it has none."""
        points = []
        for step, value in self._curves.get(self.identity(row), {}).get(tag, []):
            if value is None or not math.isfinite(value):
                break
            points.append((int(step), value))
        return points

    def _compare(self) -> None:
        """Fill `steps_to_baseline`: the step at which a run's held-out loss reaches the baseline's at its last validation on the way.

        That is the mean over its seeds, at the learning rate that is best for it; both on the part of the text that is read on the way.
        """
        for rows in grouped(self.rows, _SETTING):
            wanted = _AGAINST.get(rows[0]["study"], _NETWORK)
            baseline = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
            ends = []
            for seeds in grouped(baseline, ("lr",)):
                curves = [self.curve(row, "val/loss") for row in seeds if row["val_loss"] is not None]
                if all(curves) and len(curves) == len(seeds):
                    ends.append(statistics.fmean(curve[-1][1] for curve in curves))
            for row in rows:
                found = steps_to(self.curve(row, "val/loss"), min(ends)) if ends else None
                row["steps_to_baseline"] = None if found is None else round(found)

    def draw(self) -> list[str]:
        """Plots of every setting of every study beside the rows; the lines that say what was written, or why nothing was."""
        try:
            from mmrec.studies.plots import PANELS, draw_curves
        except ImportError as error:
            return [f"no plots ({error}); pip install matplotlib, then --plot-only"]
        written = []
        for rows in grouped(self.rows, _SETTING):
            first = rows[0]
            amount = f"{first['steps']}x{first['batch_tokens']}"
            parts = (first["study"], first["size"], first["trained_on"], amount, short_name(first["gpu"]))
            path = self.path.with_name("_".join([self.path.stem, *(str(part) for part in parts if part)]) + ".png")
            arms = {
                title: [{tag: curve for tag, _ in PANELS if (curve := self.curve(row, tag))} for row in found]
                for title, found in by_arm(rows).items()
            }
            draw_curves(path, f"{first['study']}: {first['steps']:,} steps of {first['batch_tokens']:,} tokens", arms)
            written.append(f"plot: {path}")
        return written


def by_arm(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows that differ only in their seeds, by a title."""
    arms: dict[str, list[Row]] = {}
    for row in rows:
        arms.setdefault(f"{arm_name(row)}, lr {row['lr']:g}", []).append(row)
    return arms


def summary(rows: Sequence[Row]) -> str:
    """A table for the screen: a line an arm, with mean and range of its seeds, the lowest loss first; one of NaN has diverged."""
    lines = []
    for group in grouped(rows, _SETTING):
        first = group[0]
        where = ", ".join(str(first[name]) for name in ("size", "trained_on", "gpu") if first.get(name))
        lines.append(f"{first['study']}: {first['steps']:,} steps of {first['batch_tokens']:,} tokens, {where}")
        arms = [(_mean([row["val_loss"] for row in found]), title, found) for title, found in by_arm(group).items()]
        for mean, title, found in sorted(arms, key=lambda arm: (arm[0] is None, arm[0] or 0.0)):
            losses = [row["val_loss"] for row in found if row["val_loss"] is not None]
            spread = f" ({min(losses):.4f} … {max(losses):.4f}, {len(found)} seeds)" if len(found) > 1 and losses else ""
            steps = [row["steps_to_baseline"] for row in found if row["steps_to_baseline"] is not None]
            seeds = f" ({len(steps)} of {len(found)} seeds)" if len(steps) < len(found) else ""
            to_baseline = f", at the baseline's loss after {statistics.fmean(steps):,.0f}{seeds}" if steps else ""
            said = "diverged" if mean is None else f"{mean:.4f}"
            lines.append(f"  {said}{spread}  {title}, {found[0]['params_m']} M{to_baseline}")
    return "\n".join(lines)


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one of them is none: a mean over what is left would hide it."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None
