"""The run folder: one place for everything a run writes, the same at every restart."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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
        return self.checkpoints / "last.ckpt"

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

    def run_files(self) -> list[Path]:
        """What a run has left here; nothing where none has come as far as writing its config."""
        if not self.config.is_file():
            return []
        folders = (self.checkpoints, self.tensorboard, self.memory_snapshots)
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

    def find_checkpoint(self, ckpt_path: str) -> Path | None:
        """The checkpoint that `ckpt_path` names; None for `last` where the run has none yet.

        Raises:
            FileNotFoundError: a path that is no file.
        """
        if ckpt_path == "last":
            return self.last_checkpoint if self.last_checkpoint.is_file() else None
        path = Path(ckpt_path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no checkpoint {ckpt_path}; give a file, or last for the newest under {self.checkpoints}")
        return path


def default_root(config_names: Sequence[str]) -> Path:
    """`runs/<config name>`; several configs in a row are joined, so that two overlays of one config do not share a folder."""
    return RUNS / ("+".join(Path(name).stem for name in config_names) or "default")
