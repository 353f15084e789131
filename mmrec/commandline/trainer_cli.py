"""`fit`, `validate`, `test` and `predict`: Lightning's CLI with a run folder, our callbacks and one-line errors."""

from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks import (
    AtomicCheckpointIO,
    AuxiliaryLossCurves,
    BackgroundCheckpointIO,
    FaultTolerantTensorBoardLogger,
    GPUMemoryProfile,
    LossSpikes,
    Preemption,
    RandomStates,
    RankAgreement,
    RankChange,
    RankWatch,
    RunCheckpoint,
    SameCheckpoint,
    SkippedSteps,
    StepLatency,
    TrainingProgressBar,
)
from datamodules import C4DataModule
from lightning_modules import MMRecLightningModule
from mmrec.checkpoint_files import BEST, Choice, best_copies
from mmrec.commandline.arguments import expand_configs
from mmrec.commandline.checkpoints import read_run_checkpoint
from mmrec.commandline.class_paths import restrict_class_paths
from mmrec.commandline.commands import OUR_COMMANDS, TRAINER_COMMANDS
from mmrec.commandline.configs import shipped_configs
from mmrec.commandline.errors import BadInputError
from mmrec.commandline.library_warnings import ignore_known_warnings
from mmrec.commandline.parse_errors import one_line
from mmrec.commandline.parser import PROGRAM
from mmrec.commandline.peer_wait import watch_peer_wait
from mmrec.commandline.predictions import prediction_files, write_predictions
from mmrec.commandline.preflight import check_before_building, require_groups, require_values, validation_remark, watch_remark
from mmrec.commandline.run_config import RunParser, SaveRunConfig
from mmrec.commandline.run_facts import run_facts
from mmrec.commandline.run_folder import RunFolder, default_root
from mmrec.commandline.stopping import leave_if_stopped, leave_signals_to_children
from mmrec.commandline.trainer_checks import with_options
from mmrec.files import require_writable

DESCRIPTION = "Train, evaluate and sample from MM-Rec language models."
CONFIGURABLE_CALLBACKS: dict[str, type[Callback]] = {
    "memory_profile": GPUMemoryProfile,
    "auxiliary_curves": AuxiliaryLossCurves,
    "skipped_steps": SkippedSteps,
    "loss_spikes": LossSpikes,
    "rank_watch": RankWatch,
    "step_latency": StepLatency,  # last: the forward begins when it is called, and the others' work is not part of it
}
CHECKPOINT_OPTIONS: dict[str, tuple[Any, Any, str]] = {  # name: type, default, help
    "checkpoint_every": (PositiveInt, 1000, "Optimiser steps between two writings of checkpoints/last.ckpt."),
    "checkpoint_keep": (
        NonNegativeInt,
        2,
        "Newest checkpoints that stay, named by step and loss, last.ckpt being one of them; below 2 there is none to go back to.",
    ),
    "checkpoint_best": (bool, True, "Keep the checkpoint of the lowest validation loss as well, as checkpoints/best.ckpt."),
    "checkpoint_async": (
        bool,
        True,
        "Copy the state to host memory, which must hold it once, and write it while training goes on; false: training waits.",
    ),
}
CallbackName = Literal["memory_profile", "step_latency", "auxiliary_curves", "skipped_steps", "loss_spikes", "rank_watch"]
TRAINER_DEFAULTS: dict[str, Any] = {
    "num_sanity_val_steps": -1,  # the validation before the first step is a measurement: all of it, logged at step 0
    "use_distributed_sampler": False,  # the data modules divide their samples among the ranks themselves
    "gradient_clip_val": 1.0,
}


# Some of Lightning's arguments default to members of a string enumeration (Timer's `interval`), which YAML cannot write by itself.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_str(str(member.value)))


class RunCLI(LightningCLI):
    """Lightning's CLI for MM-Rec.

    `trainer.callbacks` in a config or on the command line is the user's list: given again it is replaced, `trainer.callbacks+` appends
    to it. Our own callbacks are no part of it and stay, whatever it says; `disable_callbacks` names those to leave out, and each key of
    `CONFIGURABLE_CALLBACKS` is a group of one's arguments; so is `preemption`, which cannot be left out.

    Args:
        arguments: what follows the program's name, configs expanded.
        config_names: names given to `--config`; they name the run's folder.
        other_commands: parsers of the commands that run elsewhere, for the help.
    """

    def __init__(
        self, arguments: Sequence[str], config_names: Sequence[str] = (), other_commands: Mapping[str, ArgumentParser] | None = None
    ) -> None:
        restrict_class_paths()
        self._config_names = config_names
        self._other_commands = other_commands or {}
        self._choice = Choice(None, [], "")
        super().__init__(
            MMRecLightningModule,
            LightningDataModule,
            save_config_callback=SaveRunConfig,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_class=RunParser,
            parser_kwargs={"prog": PROGRAM, "description": DESCRIPTION},
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            # A checkpoint must not name the function that rebuilds it; `generate` reads the network's fields instead.
            load_from_checkpoint_support=False,
            args=list(arguments),
        )

    # ---- the parser

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's own, without the switch that would let checkpoints run code."""
        return {name: skipped | {"weights_only"} for name, skipped in LightningCLI.subcommands().items()}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Our own keys beside `trainer`, `model` and `data`."""
        parser.set_defaults({"data": {"class_path": f"{C4DataModule.__module__}.{C4DataModule.__qualname__}"}})
        for name, (kind, default, text) in CHECKPOINT_OPTIONS.items():
            parser.add_argument(f"--{name}", type=kind, default=default, help=text)
        parser.add_argument(
            "--disable_callbacks",
            type=list[CallbackName],
            default=[],
            help="Which of our default callbacks to leave out; trainer.callbacks holds further ones and does not replace these.",
        )
        for key, callback in {**CONFIGURABLE_CALLBACKS, "preemption": Preemption}.items():
            parser.add_lightning_class_args(callback, key)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand != "fit":
            parser.set_defaults({"ckpt_path": "last"})  # what `_settle` makes of a missing one, for --help
        return parser

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        listed = parser._subcommands_action
        assert listed is not None  # made by the line above
        for action in listed._choices_actions:  # Lightning's own texts break off where a docstring's line does
            action.help = TRAINER_COMMANDS[action.dest]
        for name, other in self._other_commands.items():
            listed.add_subcommand(name, other, help=other.description)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse and check. Lightning's own warns wherever arguments are handed in."""
        self.config = parser.parse_args(args)
        self._settle()

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would let the hyperparameters in a checkpoint override the command line's (its issue 21455)."""

    # ---- before anything is built

    @property
    def _checkpoint(self) -> Path | None:
        """What is loaded, if anything is."""
        return self._choice.path

    @property
    def run_config(self) -> Namespace:
        """The chosen subcommand's part of the config."""
        return self.config[self.config["subcommand"]]

    def _settle(self) -> None:
        """Settle the run folder and the checkpoint, and check everything that can be checked without building."""
        config, fitting = self.run_config, self.config["subcommand"] == "fit"
        require_groups(config, ["trainer", "model", "model.network", "data", *CONFIGURABLE_CALLBACKS, "preemption"])
        listed = self.parser._subcommands_action
        assert listed is not None  # made with the parser
        require_values(config, listed.choices[self.config["subcommand"]])
        config.trainer.strategy = with_options(config.trainer.strategy)
        if config.trainer.default_root_dir is None:
            config.trainer.default_root_dir = str(default_root(self._config_names))
        self.folder = RunFolder(Path(config.trainer.default_root_dir))
        if fitting and not self._config_names and config.trainer.max_steps < 1 and config.model.decay_steps is None:
            raise BadInputError(_without_config("fit"))
        # The saved config must not say where it was resumed from: the next start may be another.
        ckpt_path, config.ckpt_path = config.ckpt_path, None
        if ckpt_path is None and not fitting:
            ckpt_path = "last"  # null stands in every saved config, and random weights are never what is to be evaluated
        if ckpt_path is not None:
            self._choice = self.folder.find_checkpoint(ckpt_path)
            if self._choice.remark:
                say(f"warning: {self._choice.remark}")
            if self._checkpoint is None and not fitting:
                raise FileNotFoundError(f"no checkpoint under {self.folder.checkpoints}; give --ckpt_path FILE or run fit first")
            if not fitting:
                say(f"reading {self._checkpoint}")
        check_before_building(config, self._checkpoint, fitting)
        if self.config["subcommand"] == "predict":
            require_writable(self.folder.root, "trainer.default_root_dir")
        if fitting:
            self.folder.require_writable()
            if ckpt_path is not None and self._checkpoint is None:
                say(f"no checkpoint under {self.folder.checkpoints}, starting at step 0")

    # ---- building

    def instantiate_classes(self) -> None:
        """Data, module, Trainer; Lightning's own calls what jsonargparse has deprecated."""
        try:
            self.config_init = self.parser.instantiate(self.config)
        except ValueError as error:  # that a class raised; jsonargparse wraps it where its key takes other types as well
            if "Union subtypes" not in str(error):
                raise
            raise BadInputError(one_line(str(error))) from error
        self.datamodule, self.model = self.config_init[self.subcommand]["data"], self.config_init[self.subcommand]["model"]
        self.trainer = self.instantiate_trainer()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with the run folder's logger, our callbacks and the atomic writing of checkpoints."""
        config = {**self.config_init[self.subcommand]["trainer"].as_dict(), **kwargs}
        fitting = self.subcommand == "fit"
        if config["logger"] is None or config["logger"] is True:
            config["logger"] = self._tensorboard() if fitting else False
        plugins = config["plugins"] if isinstance(config["plugins"], list) else [config["plugins"]] if config["plugins"] else []
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            background = fitting and self.config_init[self.subcommand]["checkpoint_async"]
            plugins = [*plugins, BackgroundCheckpointIO() if background else AtomicCheckpointIO()]
        config["plugins"] = plugins
        try:
            return self._instantiate_trainer(config, self._our_callbacks(config))
        except (ValueError, ModuleNotFoundError, MisconfigurationException) as error:  # what does not go together
            raise BadInputError(f"trainer: {error}") from error
        except RuntimeError as error:
            if "more than one stateful callback" not in str(error):
                raise
            name = str(error).partition("`")[2].partition("`")[0]
            raise BadInputError(
                f"trainer.callbacks: there is a {name} already; take one out, or change its options by its own key"
            ) from error

    def _tensorboard(self) -> TensorBoardLogger:
        folder, purge_step = self.folder, None
        if self._checkpoint is not None:
            # A killed run has logged steps behind its last checkpoint; they are taken again, and TensorBoard is to forget the first time.
            # Not the checkpoint's own step: it may hold the validation that no resumed run repeats.
            purge_step = read_run_checkpoint(self._checkpoint)["global_step"] + 1
        return FaultTolerantTensorBoardLogger(
            folder.root, name=folder.tensorboard.name, version="", default_hp_metric=False, purge_step=purge_step
        )

    def _our_callbacks(self, config: Mapping[str, Any]) -> list[Callback]:
        run = self.config_init[self.subcommand]
        ours: list[Callback] = [SameCheckpoint(self._checkpoint)]
        ours += [run[key] for key in CONFIGURABLE_CALLBACKS if key not in run["disable_callbacks"]]
        if config["enable_progress_bar"] is not False:
            ours.append(TrainingProgressBar())
        if self.subcommand == "fit":
            ours += [RandomStates(), RankChange(), RankAgreement(run_facts(self.run_config.as_dict())), run["preemption"]]
            if config["enable_checkpointing"] is not False:
                options = {"every_n_steps": run["checkpoint_every"], "keep": run["checkpoint_keep"], "keep_best": run["checkpoint_best"]}
                ours.append(RunCheckpoint(dirpath=str(self.folder.checkpoints), damaged=self._choice.damaged, **options))
        return ours

    # ---- running

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        return {**kwargs, "ckpt_path": None if self._checkpoint is None else str(self._checkpoint), "weights_only": True}

    def predict(self, **kwargs: Any) -> None:
        """Write how well each sequence was foreseen: index, mean negative log-likelihood in nats, number of tokens, a line each.

        Of W processes, process R writes `predictions.R.jsonl`, the lines of sequences R, R + W, R + 2W, ...
        """
        batches: list[Any] = self.trainer.predict(**kwargs) or []
        world_size = self.trainer.world_size
        write_predictions(self.folder.root, batches, self.trainer.global_rank, world_size)
        names = " … ".join(str(path) for path in prediction_files(self.folder.root, world_size)[:: max(world_size - 1, 1)])
        say(f"predictions: {names}, one line a sequence" + (", a file a process" if world_size > 1 else ""))

    def before_fit(self) -> None:
        """Remember what an earlier run left, before this one makes files of its own; it is moved once nothing is refused any more."""
        for remark in (watch_remark(self.trainer), validation_remark(self.trainer)):
            if remark is not None:
                say(f"warning: {remark}")
        leave_signals_to_children(self.trainer)
        watch_peer_wait(self.trainer)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]  # Lightning's list
            if isinstance(callback, SaveRunConfig) and self._checkpoint is None:
                callback.earlier_files = self.folder.run_files()

    def after_fit(self) -> None:
        """Say where the run's files lie; of a run that a signal ended also that, and leave as a scheduler expects."""
        if not self.run_config.trainer.fast_dev_run:  # which writes nothing
            self._say_what_was_written()
        leave_if_stopped(self.trainer, self.config_init[self.subcommand]["preemption"])

    def _say_what_was_written(self) -> None:
        if self._checkpoint is not None and self.model.last_step_loss is None and 0 <= self.trainer.max_steps <= self.trainer.global_step:
            say(f"no step was trained: {self._checkpoint} is at step {self.trainer.global_step}; raise --trainer.max_steps to go on")
        say(f"TensorBoard logs: {self.folder.tensorboard} (tensorboard --logdir {self.folder.tensorboard})")
        if self.folder.last_checkpoint.is_file():
            say(f"last checkpoint: {self.folder.last_checkpoint}")
        for best in best_copies(self.folder.checkpoints)[:1]:
            say(f"best checkpoint: {self.folder.checkpoints / BEST}, of step {best.step} with a val/loss of {best.val_loss:.3f}")


def _without_config(command: str) -> str:
    return f"{command}: no config; give --config NAME, a file of yours or one of {', '.join(shipped_configs())} (cpu_tiny fits a CPU)"


@rank_zero_only
def say(line: str) -> None:
    """Print one line, once however many processes train."""
    print(line, flush=True)


def run_trainer(arguments: Sequence[str]) -> None:
    """Run one of Lightning's commands, or show the help of all.

    Args:
        arguments: what follows the program's name, as typed.
    """
    if len(arguments) == 1 and arguments[0] in TRAINER_COMMANDS:
        raise BadInputError(_without_config(arguments[0]))
    ignore_known_warnings()
    expanded = expand_configs(arguments)
    listed = {} if arguments[0] in RunCLI.subcommands() else {name: command.build_parser() for name, command in OUR_COMMANDS.items()}
    RunCLI(expanded.arguments, expanded.config_names, listed)
