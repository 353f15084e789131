"""Write the curves of a run as JSON, with the machine and the versions: `python benchmarks/curves.py RUN_FOLDER OUTPUT.json`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmrec.commandline.plain_parser import PlainParser
from mmrec.files import write_atomically
from mmrec.measuring.machine import device, machine, software

CURVES = ("train/loss", "train/loss_main", "train/loss_aux", "train/grad_norm", "val/", "aux/")
PATHS = ("default_root_dir", "tokens_dir", "tokenizer", "train_files", "validation_files", "cache_dir", "snapshot_dir", "dirpath")
POINTS = 60  # a tag, at the most; the ends are always kept


def thin(points: list[Any]) -> list[Any]:
    """At most POINTS of them, evenly spaced, first and last included."""
    if len(points) <= POINTS:
        return points
    return [points[round(index * (len(points) - 1) / (POINTS - 1))] for index in range(POINTS)]


def without_folders(value: Any, key: str = "") -> Any:
    """A config with only the last component of what the keys of PATHS hold: the folders are this machine's."""
    if isinstance(value, dict):
        # A mapping of validation sources holds paths under names of its own.
        return {name: without_folders(item, key if key in PATHS else name) for name, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item, key) for item in value]
    return Path(value).name if key in PATHS and isinstance(value, str) else value


def curves(run: Path) -> dict[str, Any]:
    """Everything worth keeping of a run folder."""
    events = EventAccumulator(str(run / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    tags = sorted(events.Tags()["scalars"])
    scalars = {tag: events.Scalars(tag) for tag in tags}
    first, last = scalars["train/loss"][0], scalars["train/loss"][-1]
    return {
        **machine(device()),
        **software(),
        "config": without_folders(yaml.safe_load((run / "config.yaml").read_text())),
        "steps": last.step + 1,
        "seconds_of_training": round(last.wall_time - first.wall_time, 1),
        "tags": tags,
        "last": {tag: points[-1].value for tag, points in scalars.items()},
        "curves": {
            tag: [[point.step, float(f"{point.value:.6g}")] for point in thin(points)]
            for tag, points in scalars.items()
            if tag.startswith(CURVES)
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Read a run folder, write JSON.

    Args:
        arguments: what follows the program's name; None: `sys.argv`.
    """
    parser = PlainParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder, with tb/ and config.yaml")
    parser.add_argument("output", type=Path, help="the JSON file to write")
    options = parser.parse_args(arguments)
    if not (options.run / "tb").is_dir():
        parser.error(f"{options.run} is no run folder: it has no tb/")
    write_atomically(options.output, (json.dumps(curves(options.run), indent=1, allow_nan=False) + "\n").encode())
    print(options.output)


if __name__ == "__main__":
    main()
