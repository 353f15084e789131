"""Plots of studies: curves of arms with bands of their seeds, recall by bytes of state, loss by position."""

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


_LINES = ("-", "--", ":", "-.")  # there are ten colours, and studies of sixty arms


def draw_curves(path: Path, title: str, arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write a picture of trainings: a line an arm, its seeds' mean, within the band from the lowest to the highest.

    Args:
        path: the file.
        title: above it.
        arms: by their titles, each a list of runs, each a mapping of tags to curves [[step, value], …].
    """
    panels = [panel for panel in PANELS if any(panel[0] in run for runs in arms.values() for run in runs)]
    size = (6 * max(1, len(panels)) + 3, max(4.5, 0.18 * len(arms)))
    figure, axes = pyplot.subplots(1, max(1, len(panels)), figsize=size, squeeze=False, layout="constrained")
    for axis, (tag, label) in zip(axes[0], panels, strict=False):
        for index, (name, runs) in enumerate(arms.items()):  # an arm has its colour in every panel
            curves = [np.asarray(run[tag], dtype=float) for run in runs if run.get(tag)]
            if not curves:
                continue
            steps = curves[0][:, 0]
            values = np.stack([np.interp(steps, curve[:, 0], curve[:, 1]) for curve in curves])
            look = {"color": f"C{index % 10}", "linestyle": _LINES[index // 10 % len(_LINES)]}
            (line,) = axis.plot(steps, values.mean(0), label=f"{name} ({len(curves)})", linewidth=1.2, **look)
            axis.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
        if "loss" in tag:
            _show_the_end(axis)
        axis.set_xlabel("optimiser steps")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    if panels:
        named = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(named.values(), named.keys(), loc="outside right upper", fontsize=7)
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


def draw_recall(path: Path, title: str, arms: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Write a picture of recall by bytes of state.

    Args:
        path: the file.
        title: above it.
        arms: by their names, each (bytes of state, accuracy) of its networks.
    """
    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, points in arms.items():
        axis.plot(*zip(*points, strict=True), "o", label=name)
    axis.set_xscale("log", base=2)
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlabel("bytes of state a sequence")
    axis.set_ylabel("share of answers recalled")
    _finish(figure, axis, title, path)


def draw_positions(path: Path, networks: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write a picture of losses by position, with standard errors.

    Args:
        path: the file.
        networks: by their titles, each the rows of its bins.
    """
    figure, axis = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for name, rows in networks.items():
        middles = [(row["position_from"] + row["position_to"]) / 2 for row in rows]
        errors = [row["standard_error"] or 0.0 for row in rows]
        axis.errorbar(middles, [row["loss"] for row in rows], yerr=errors, label=name, marker="o", markersize=3, linewidth=1, capsize=2)
    for length in {row["trained_length"] for rows in networks.values() for row in rows}:
        axis.axvline(length, color="grey", linestyle=":", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("position in the window, tokens; dotted: the training's length")
    axis.set_ylabel("loss, nats a token")
    _finish(figure, axis, "Loss by position", path)


def _finish(figure: Any, axis: Any, title: str, path: Path) -> None:
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    axis.set_title(title, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
