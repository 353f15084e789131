"""A run's config: read with errors of one line, and written into the run folder once the run begins."""

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import Logger

from mmrec.commandline.class_paths import subclass_names
from mmrec.commandline.parser import OneLineErrors
from mmrec.commandline.run_folder import RunFolder
from mmrec.files import replacing


class RunParser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser with errors of one line."""

    def known_classes(self) -> dict[str, list[str]]:
        """Data modules, callbacks and loggers that have been imported."""
        bases = {"data": LightningDataModule, "trainer.callbacks": Callback, "trainer.logger": Logger}
        return {key: subclass_names(base) for key, base in bases.items()}


class SaveRunConfig(SaveConfigCallback):
    """Writes the resolved config into the run folder, over the one of an earlier start, or after moving an earlier run aside.

    Attributes:
        earlier_files: what an earlier run left that is not gone on with.
    """

    earlier_files: Sequence[Path] = ()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet: what the data, the module or the checkpoint refuse must leave no file behind, and move none."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move and write, once everything is set up and the checkpoint's weights are loaded; on rank 0."""
        if not trainer.is_global_zero:
            return
        folder = RunFolder(Path(trainer.default_root_dir))
        if self.earlier_files:
            remark = "--ckpt_path last would have gone on with it" if folder.last_checkpoint.exists() else "it has no last checkpoint"
            aside = folder.set_aside(self.earlier_files)
            print(f"moved the earlier run under {folder.root} to {aside} ({remark})", flush=True)
        with replacing(folder.config) as temporary:
            self.parser.save(self.config, str(temporary), skip_unset=False, overwrite=True, multifile=False)
