"""The run folder: one place for everything a run writes, the same at every restart."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mmrec.checkpoint_files import BEST, LAST, Choice, newest_readable, require_whole
from mmrec.files import require_writable

RUNS = Path("runs")


class RunFolder(NamedTuple):
    """Paths under `trainer.default_root_dir`."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        """Checkpoints, in the same folder at every restart."""
        return self.root / "checkpoints"

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint that `--ckpt_path last` means."""
        return self.checkpoints / LAST

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.root / "tb"

    @property
    def config(self) -> Path:
        """The resolved config of the latest `fit`, good for `--config` again."""
        return self.root / "config.yaml"

    @property
    def memory_snapshots(self) -> Path:
        """Snapshots of the memory profile."""
        return self.root / "memory"

    @property
    def batches(self) -> Path:
        """Texts of steps that were skipped and of loss spikes."""
        return self.root / "batches"

    def run_files(self) -> list[Path]:
        """What a run has left here; nothing where none has come as far as writing its config."""
        if not self.config.is_file():
            return []
        folders = (self.checkpoints, self.tensorboard, self.memory_snapshots, self.batches)
        return [path for folder in folders for path in folder.glob("*")] + [self.config, *self.root.glob("predictions*.jsonl")]

    def set_aside(self, files: Sequence[Path]) -> Path:
        """Move `files` of an earlier run into `earlier/NNN`, so that two runs never share curves or checkpoints.

        Args:
            files: what `run_files` gave before the new run made any of its own; those that are gone are passed over.

        Returns:
            The new place.
        """
        earlier = self.root / "earlier"
        earlier.mkdir(exist_ok=True)
        taken = [int(folder.name) for folder in earlier.iterdir() if folder.name.isdigit()]
        aside = earlier / f"{max(taken, default=0) + 1:03d}"
        for path in files:
            if path.exists():
                target = aside / path.relative_to(self.root)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)
        return aside

    def require_writable(self) -> None:
        """Raise a one-line OSError unless the folder, or the nearest parent that exists, can be written."""
        for folder in (self.root, self.checkpoints, self.tensorboard):
            require_writable(folder, "trainer.default_root_dir")

    def find_checkpoint(self, ckpt_path: str) -> Choice:
        """The checkpoint that `ckpt_path` names.

        Args:
            ckpt_path: a file; `best`, the one of the lowest validation loss; or `last`, the newest that can be read: where `last.ckpt` is
                damaged or gone, that is the newest copy beside it, and the choice says so. `last` alone may be none.

        Raises:
            FileNotFoundError: a path that is no file, no best.
            ValueError: `last` where there are checkpoints and none can be gone on from (see `newest_readable`); another that is damaged.
        """
        if ckpt_path == "last":
            return newest_readable(self.checkpoints)
        if ckpt_path == "best" and not (self.checkpoints / BEST).is_file():
            raise FileNotFoundError(f"no {BEST} under {self.checkpoints}: no validation has run, or checkpoint_best is false; give last")
        path = self.checkpoints / BEST if ckpt_path == "best" else Path(ckpt_path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no checkpoint {ckpt_path}; give a file, or last for the newest under {self.checkpoints}")
        require_whole(path, self.checkpoints)
        return Choice(path, [], "")


def default_root(config_names: Sequence[str]) -> Path:
    """`runs/<config name>`; several configs in a row are joined, so that two overlays of one config do not share a folder."""
    return RUNS / ("+".join(Path(name).stem for name in config_names) or "default")


def run_and_checkpoint(run: str | None, ckpt_path: str) -> tuple[RunFolder, Path]:
    """The run folder and the checkpoint that a command's `--run` and `--ckpt_path` mean; why it is not the newest goes to standard error.

    Raises:
        FileNotFoundError, ValueError: none there, or nothing given to find one by; one line.
    """
    if run is None and ckpt_path in ("last", "best"):
        found = sorted(str(path.parent.parent) for path in RUNS.glob(f"*/checkpoints/{LAST}"))
        raise ValueError(f"give a run folder as --run ({', '.join(found) or f'none found under {RUNS}: run fit first'})")
    # A checkpoint lies in RUN/checkpoints.
    folder = RunFolder(Path(run) if run is not None else Path(ckpt_path).absolute().parent.parent)
    checkpoint, _, remark = folder.find_checkpoint(ckpt_path)
    if remark:
        print(f"warning: {remark}", file=sys.stderr, flush=True)
    if checkpoint is None:
        raise FileNotFoundError(f"no checkpoint under {folder.checkpoints}; run fit first or give another --run")
    return folder, checkpoint
