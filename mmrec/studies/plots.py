"""Plots of a study: curves of arms, each a line of its seeds' mean within the band from the lowest to the highest."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

# What is drawn: the tag of a curve, and the axis' title.
PANELS = (
    ("val/loss", "held-out loss, nats a token"),
    ("train/loss_main", "training loss, nats a token"),
    ("aux/grad_cosine", "cosine of auxiliary and main gradient"),
)


def draw_curves(path: Path, title: str, arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write a picture.

    Args:
        path: the file.
        title: above it.
        arms: by their titles, each a list of runs, each a mapping of tags to curves [[step, value], …].
    """
    panels = [panel for panel in PANELS if any(panel[0] in run for runs in arms.values() for run in runs)]
    figure, axes = pyplot.subplots(1, max(1, len(panels)), figsize=(6 * max(1, len(panels)), 4.5), squeeze=False, layout="constrained")
    for axis, (tag, label) in zip(axes[0], panels, strict=False):
        for name, runs in arms.items():
            curves = [np.asarray(run[tag], dtype=float) for run in runs if run.get(tag)]
            if not curves:
                continue
            steps = curves[0][:, 0]
            values = np.stack([np.interp(steps, curve[:, 0], curve[:, 1]) for curve in curves])
            (line,) = axis.plot(steps, values.mean(0), label=f"{name} ({len(curves)})", linewidth=1.2)
            axis.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
        if tag.endswith("loss") or "loss" in tag:
            _show_the_end(axis)
        axis.set_xlabel("optimiser steps")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    if panels:
        axes[0][0].legend(fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _show_the_end(axis: Any) -> None:
    """Cut off the first steep fall, beside which arms could not be told apart."""
    lines = [line.get_ydata() for line in axis.get_lines()]
    if lines:
        low = min(float(np.min(values)) for values in lines)
        high = max(float(values[len(values) // 5]) for values in lines)
        axis.set_ylim(low - 0.05 * (high - low), high)
