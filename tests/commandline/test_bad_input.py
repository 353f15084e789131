"""Every kind of bad input: one line that names the thing, exit code 2, nothing written."""

import sys
from pathlib import Path
from typing import Any

import pytest

from mmrec.commandline.errors import BadInputError

OPTIONS = {
    ("--trainer.max_step", "4"): "unknown key trainer.max_step; did you mean trainer.max_steps?",
    ("--model.network.modell_dim", "4"): "unknown key model.network.modell_dim; did you mean model.network.model_dim?",
    ("--model.model_dim", "4"): "unknown key model.model_dim; did you mean model.network.model_dim?",
    ("--model.lr", "4"): "unknown key model.lr; did you mean model.learning_rate?",
    ("--model.network.model_dim", "abc"): "model.network.model_dim: expected int, got abc",
    ("--model.learning_rate", ".nan"): "model.learning_rate is nan; give a finite number above 0",
    ("--data.seq_lenn", "3"): "unknown key data.seq_lenn of C4DataModule; did you mean data.seq_len?",
    ("--data.seq_len", "x"): "data.seq_len: expected int, got x",
    ("--data.seq_len", "0"): "data.seq_len=0 must be at least 1",
    ("--data", "C4DataModul"): "data: no class C4DataModul; did you mean C4DataModule?",
    ("stray",): "unrecognized arguments: stray; options start with -- and are spelled out",
    ("--model.network.pe_dim", "7"): "model.network.pe_dim = 7 does not divide model_dim = 128; choose a divisor",
    ("--model.network.num_heads", "3"): "model.network.num_heads = 3 does not divide model_dim = 128; choose a divisor",
    ("--model.network.vocab_size", "100"): "the tokenizer has 4096 tokens but the network 100; set model.network.vocab_size=4096",
    ("--trainer.precision", "bf17"): "; did you mean bf16?",
    ("--trainer.precision", "16-mixed"): "trainer.precision: 16-mixed is not supported; choose one of 32-true,",
    ("--trainer.max_steps", "-1"): "trainer.max_steps: the run has no end; give the number of optimiser steps",
    ("--trainer.strategy", "fsdp3"): "trainer.strategy: no strategy fsdp3; did you mean fsdp?",
    ("--checkpoint_every", "0"): "checkpoint_every: expected a whole number above 0, got 0",
    ("--checkpoint_keep", "-1"): "checkpoint_keep: expected a whole number from 0, got -1",
    ("--checkpoint_async", "maybe"): "checkpoint_async: expected bool, got maybe",
    ("--checkpoint_kep", "3"): "unknown key checkpoint_kep; did you mean checkpoint_keep?",
    ("--ckpt_path", "best"): "no best.ckpt under runs/cpu_tiny/checkpoints: no validation has run, or checkpoint_best is false; give last",
    ("--disable_callbacks", "[step]"): "got step; did you mean step_latency?",
    ("--step_latency.windo", "3"): "unknown key step_latency.windo; did you mean step_latency.window?",
    ("--resume",): "unknown key resume; a checkpoint is given as --ckpt_path FILE, or last for the newest",
    ("--trainer.resume_from_checkpoint", "x"): "unknown key trainer.resume_from_checkpoint; a checkpoint is given as --ckpt_path FILE",
    ("--model.network.planning_horizon", "1"): "unknown key model.network.planning_horizon: there is no such option any more; take it out",
    ("--model.network.window_every", "5"): "model.network.window_every = 5 is more than num_layers = 2, no layer would have a window;",
    ("--ckpt_path", "none.ckpt"): "no checkpoint none.ckpt; give a file, or last for the newest under runs/cpu_tiny/checkpoints",
    (
        "--trainer.strategy",
        "fsdp2",
        "--model.cuda_graph",
        "true",
    ): "model.cuda_graph: weights in shards fit no CUDA graph; set it to false with FSDP2Strategy",
    ("--trainer.strategy", "fsdp2", "--model.network.use_uboo", "true"): (
        "auxiliary_curves.gradients_every_n_steps: gradients of weights in shards cannot be compared; set it to 0 with FSDP2Strategy"
    ),
    (
        "--trainer.strategy",
        "lightning_modules.fsdp2_strategy.FSDP2Strategy",
        "--trainer.strategy.gradients",
        "fp8",
    ): "trainer.strategy.gradients: expected one of full, bf16, fp32, got fp8",
    ("--data.source", "local", "--data.tokenizer", "t.json", "--data.train_files", "none/*"): "data.train_files: no file matches 'none/*'",
    ("--data.source", "tokens", "--data.tokens_dir", "none"): "data.tokens_dir: no manifest.json in none",
}

FILES = {
    "trainer:\n  max_step: 3\n": "unknown key trainer.max_step; did you mean trainer.max_steps?",
    "trainerr:\n  max_steps: 3\n": "unknown key trainerr.max_steps; did you mean trainer.max_steps?",
    "trainer:\n  max_steps: .nan\n": "trainer.max_steps: expected int, got nan",
    "trainer: 3\n": "trainer: expected a mapping of keys to values, got 3",
    "model:\n  network: 3\n": "model.network: expected a mapping of keys to values, got 3",
    "data: 3\n": "data: expected a class path, or a mapping with class_path and init_args, or null, got 3",
    "model:\n  network:\n    pe_dim: [1]\n": "model.network.pe_dim: expected int or null, got [1]",
    "model:\n  network: {planning_loss: mze}\n": (
        "model.network.planning_loss: expected one of mse, normalized, got mze; did you mean mse?"
    ),
    "data:\n  class_path: datamodules.RecallDataModule\n  init_args:\n    train_pairs: some\n": (
        "data.train_pairs: expected list or null, got some"
    ),
    "data:\n  class_path: datamodules.RecallDataModule\n  init_args:\n    train_pairs: [1.5]\n": (
        "data.train_pairs: expected a list of int or null, got [1.5]"
    ),
    "data:\n  init_args:\n    seq_len: .nan\n": "data.seq_len: expected int, got nan",
    "data:\n  class_path: datamodules.C4DataModul\n": "data: datamodules has no class C4DataModul; did you mean C4DataModule?",
    "trainer:\n  callbacks: 3\n": "trainer.callbacks: expected list or a class path,",
    "trainer:\n  callbacks:\n  - class_path: LearningRateMonitorr\n": (
        "trainer.callbacks: no class LearningRateMonitorr; did you mean LearningRateMonitor?"
    ),
    "trainer:\n  callbacks:\n  - ModelSummary\n  - class_path: EarlyStopping\n    init_args: {monitr: a, monitor: a}\n": (
        "unknown key trainer.callbacks.monitr of EarlyStopping; did you mean trainer.callbacks.monitor?"
    ),
    "trainer:\n  callbacks:\n  - class_path: EarlyStopping\n    init_args: {monitor: a, patience: b}\n": (
        "trainer.callbacks.patience: expected int, got b"
    ),
    "trainer:\n  callbacks:\n  - class_path: EarlyStopping\n": "trainer.callbacks: lightning.pytorch.callbacks.EarlyStopping needs monitor",
    "trainer:\n  logger:\n    class_path: TensorBoardLogger\n    init_args: {save: x}\n": (
        "unknown key trainer.logger.save of TensorBoardLogger; did you mean trainer.logger.save_dir?"
    ),
    "trainer:\n  callbacks:\n  - class_path: lightning.pytorch.callbacks.model_checkpoint.os.system\n": "posix.system is refused",
    "seed_everything: abc\n": "seed_everything: expected bool or int, got abc",
}


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_a_bad_option_is_one_line(options: tuple[str, ...], cli, tmp_path: Path) -> None:
    assert OPTIONS[options] in cli("fit", "--config", "cpu_tiny", *options).error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", FILES)
def test_a_bad_config_is_one_line(content: str, cli, tmp_path: Path) -> None:
    Path("x.yaml").write_text(content)
    assert FILES[content] in cli("fit", "--config", "cpu_tiny", "--config", "x.yaml").error
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]


def test_configs_in_folders_are_pointed_to(cli) -> None:
    assert cli("configs", "nope").error.endswith("study_35m; more in ablation/, baselines/, recall/")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no command given; choose one of fit, validate, test, predict, generate, export, prepare, configs, doctor, or --help"),
        (("fitt",), "no command fitt; did you mean fit?"),
        (("train",), "no command train; did you mean fit?"),
        (("fit",), "fit: no config; give --config NAME, a file of yours or one of a100_7b, a100_7b_fsdp2, cpu_tiny, debug, h100_125m, "),
        (("fit", "--trainer.accelerator", "cpu"), "fit: no config; give --config NAME"),
        (("predict",), "predict: no config; give --config NAME"),
        (("fit", "--config"), "--config needs the name or path of a config"),
        (("configs", "nope"), "no config nope. Shipped ones: a100_7b,"),
        (("configs", "--jso"), "unknown key jso; did you mean json?"),
        (("prepare",), "missing --files, --output"),
        (("prepare", "--files", "none/*", "--output", "o"), "files: no file matches 'none/*'"),
        (("generate", "--topk", "2"), "unknown key topk; did you mean top_k?"),
        (("generate", "--run", "none"), "no checkpoint under none/checkpoints; run fit first or give another --run"),
        (("generate", "--temperature", "-1"), "temperature is -1.0; give a finite number of at least 0 (0 is greedy)"),
        (("validate", "--config", "cpu_tiny"), "no checkpoint under runs/cpu_tiny/checkpoints; give --ckpt_path FILE or run fit first"),
    ],
)
def test_a_bad_command_is_one_line(arguments: tuple[str, ...], message: str, cli, tmp_path: Path) -> None:
    assert cli(*arguments).error.startswith(message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
def test_a_missing_gpu_is_named_before_missing_data(accelerator: str, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = ("fit", "--config", "study_35m", "--trainer.accelerator", accelerator)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert cli(*fit).error.startswith(f"trainer.accelerator: {accelerator}, and no GPU is seen here; use a machine with one ")
    # What is wrong on any machine still comes first, and with a GPU the data.
    assert cli(*fit, "--model.network.pe_dim", "7").error.startswith("model.network.pe_dim = 7")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert cli(*fit).error.startswith("data.tokens_dir: no manifest.json in tokens/books")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "wanted"), [(("--model.optimizer", "adamw_8bit"), "model.optimizer=adamw_8bit"), (("--model.fp8", "true"), "model.fp8")]
)
def test_torchao_is_missed_before_anything_is_built(option: tuple[str, str], wanted: str, cli, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("lightning_modules.optimizers.find_spec", lambda name: None)
    error = cli("fit", "--config", "cpu_tiny", *option).error
    assert error == f"{wanted} needs torchao, which is not installed; install it: pip install torchao, or the extra [train]"
    assert list(tmp_path.iterdir()) == []


def test_a_hang_that_the_strategy_would_end_first_is_told_of_before_training(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(trainer: Any) -> None:
        raise BadInputError("enough; take the rest away")

    monkeypatch.setattr("mmrec.commandline.trainer_cli.leave_signals_to_children", reached)
    two = ("fit", "--config", "cpu_tiny", "--trainer.devices", "2", "--trainer.strategy", "lightning_modules.strategies.TunedDDPStrategy")
    late = cli(*two, "--trainer.strategy.timeout_seconds", "300")
    assert late.error.startswith("enough")
    assert [line for line in late.out.splitlines() if line.startswith("warning: rank_watch.hang_after_seconds is 540, and by trainer.")]
    for fine in (("--rank_watch.hang_after_seconds", "200"), ("--disable_callbacks", "[rank_watch]")):
        assert "hang_after_seconds" not in cli(*two, "--trainer.strategy.timeout_seconds", "300", *fine).out


def test_a_best_checkpoint_within_a_step_is_told_of_before_training(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(trainer: Any) -> None:
        raise BadInputError("enough; take the rest away")

    monkeypatch.setattr("mmrec.commandline.trainer_cli.leave_signals_to_children", reached)
    fit = ("fit", "--config", "cpu_tiny", "--trainer.val_check_interval", "6", "--trainer.accumulate_grad_batches")
    (line,) = [line for line in cli(*fit, "4").out.splitlines() if line.startswith("warning: trainer.val_check_interval is 6 batches")]
    assert line.endswith("; give a multiple of 4")
    for fine in ([*fit, "3"], [*fit, "4", "--checkpoint_best", "false"]):
        assert "val_check_interval" not in cli(*fine).out


@pytest.mark.parametrize("folder", ["a_file", "a_file/below", "/proc/mmrec"])
def test_a_run_folder_that_cannot_be_written_is_refused_before_anything_is_built(folder: str, cli) -> None:
    Path("a_file").write_text("in the way")
    error = cli("fit", "--config", "cpu_tiny", "--trainer.default_root_dir", folder).error
    assert error.startswith(f"trainer.default_root_dir {folder} cannot be written: ")


@pytest.mark.parametrize("where", ["callbacks", "callbacks+", "logger", "data"])
def test_a_class_path_outside_the_stated_packages_is_never_imported(where: str, cli, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "evilmod.py").write_text("import pathlib\npathlib.Path('canary').touch()\nclass X: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = "data:\n  class_path: evilmod.X\n" if where == "data" else f"trainer:\n  {where}:\n    - class_path: evilmod.X\n"
    Path("x.yaml").write_text(spec.replace("    - class", "    class") if where == "logger" else spec)
    for extra in ([], ["--print_config"]):
        error = cli("fit", "--config", "cpu_tiny", "--config", "x.yaml", *extra).error
        assert "class path evilmod.X is refused; a config may name classes of lightning.pytorch.callbacks, " in error
    assert "evilmod" not in sys.modules
    assert not Path("canary").exists()
