"""Wrong configs of every kind, as `fit` meets them: one line with the key and a remedy, exit code 2, the folder as it was."""

import re
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from jsonargparse import Namespace
from lightning.pytorch.strategies import DDPStrategy, Strategy

from callbacks import RankWatch
from lightning_modules.fsdp2_strategy import FSDP2Strategy
from lightning_modules.strategies import TunedDDPStrategy
from mmrec.commandline.errors import BadInputError
from mmrec.commandline.memory_check import check_memory
from mmrec.commandline.preflight import watch_remark
from mmrec.commandline.trainer_cli import RunCLI

# What tells the reader how to go on: a nearest name, what would be accepted, or an order.
REMEDY = re.compile(
    r"did you mean \w|; (give|choose|set|use|correct|take|write|save|leave|install|raise|lower)\b|: expected \w|; it was trained with"
    r"|must be at least|a config may name classes of|Shipped ones: "
)
SECONDS = 60  # on busy cores; 10 and less on idle ones
TUNED = "lightning_modules.strategies.TunedDDPStrategy"
SHARDED = "lightning_modules.fsdp2_strategy.FSDP2Strategy"
STRATEGY = "trainer:\n  strategy:\n    class_path: " + TUNED + "\n    init_args: "
IN_SHARDS = "auxiliary_curves: {gradients_every_n_steps: 0}\n" + STRATEGY.replace(TUNED, SHARDED)
NETWORK = Namespace(optimizer="adamw", network=Namespace(vocab_size=300, model_dim=192, num_layers=2, num_heads=2))

# Content of x.yaml, laid over cpu_tiny, and the key or file that the line must name first.
FILES = {
    # Typos at each level.
    "trainr: {max_steps: 3}": "unknown key trainr.max_steps",
    "trainer: {max_step: 3}": "unknown key trainer.max_step",
    "model: {network: {widht: 3}}": "unknown key model.network.widht",
    "data: {init_args: {sequence_len: 3}}": "unknown key data.sequence_len",
    "preemption: {requeu: true}": "unknown key preemption.requeu",
    "checkpoint_evry: 3": "unknown key checkpoint_evry",
    "rank_watch: {hang_after: 3}": "unknown key rank_watch.hang_after",
    STRATEGY + "{timeout_second: 3}": "unknown key trainer.strategy.timeout_second",
    # Wrong types, null among them.
    "model: {learning_rate: fast}": "model.learning_rate",
    "model: {learning_rate: null}": "model.learning_rate",
    "model: {network: {num_layers: 2.5}}": "model.network.num_layers",
    "checkpoint_every: null": "checkpoint_every",
    "checkpoint_async: maybe": "checkpoint_async",
    "preemption: 3": "preemption",
    "skipped_steps: [1]": "skipped_steps",
    "preemption: {requeue: maybe}": "preemption.requeue",
    "trainer: {devices: two}": "trainer.devices",
    # NaN and infinity.
    "model: {learning_rate: .inf}": "model.learning_rate",
    "model: {weight_decay: .nan}": "model.weight_decay",
    "trainer: {gradient_clip_val: .nan}": "trainer.gradient_clip_val",
    "loss_spikes: {sigmas: .nan}": "loss_spikes.sigmas",
    "rank_watch: {interval_seconds: .nan}": "rank_watch.interval_seconds",
    "rank_watch: {dead_after_seconds: .nan}": "rank_watch.dead_after_seconds",
    "rank_watch: {hang_after_seconds: .inf}": "rank_watch.hang_after_seconds",
    STRATEGY + "{timeout_seconds: .nan}": "trainer.strategy.timeout_seconds",
    # Negative counts, and sizes that cannot be.
    "seed_everything: -1": "seed_everything",
    "trainer: {num_nodes: 0}": "trainer.num_nodes",
    "trainer: {devices: -2}": "trainer.devices",
    "trainer: {accumulate_grad_batches: 0}": "trainer.accumulate_grad_batches",
    "trainer: {check_val_every_n_epoch: 0}": "trainer.check_val_every_n_epoch",
    "trainer: {log_every_n_steps: -1}": "trainer.log_every_n_steps",
    "trainer: {val_check_interval: 0}": "trainer.val_check_interval",
    "trainer: {limit_val_batches: -1}": "trainer.limit_val_batches",
    "trainer: {default_root_dir: ''}": "trainer.default_root_dir",
    "checkpoint_keep: -1": "checkpoint_keep",
    "skipped_steps: {max_in_row: 0}": "skipped_steps.max_in_row",
    "loss_spikes: {window: 5}": "loss_spikes.window",
    "rank_watch: {hang_after_seconds: -1}": "rank_watch.hang_after_seconds",
    IN_SHARDS + "{timeout_seconds: .inf}": "trainer.strategy.timeout_seconds",
    IN_SHARDS + "{process_group_backend: mpi}": "trainer.strategy.process_group_backend",
    STRATEGY + "{timeout_seconds: 0}": "trainer.strategy.timeout_seconds",
    STRATEGY + "{bucket_cap_mb: 0}": "trainer.strategy.bucket_cap_mb",
    "data: {init_args: {num_workers: -1}}": "data.num_workers",
    "model: {network: {num_heads: 3}}": "model.network.num_heads",
    "model: {network: {model_dim: 1000000}}": "model.network",  # 400 TB
    "model: {network: {num_layers: 1000000}}": "model.network",
    "model: {network: {model_dim: 1000000000}}": "model.network",  # more bytes than 64 bits count
    "data: {init_args: {batch_size: 10000000}}": "data.batch_size",
    # What is no class, no strategy, no precision.
    "model: {optimizer: adamx}": "model.optimizer",
    "trainer: {precision: bf61}": "trainer.precision",
    "trainer: {accelerator: tpux}": "trainer.accelerator",
    "trainer: {strategy: dpp}": "trainer.strategy",
    "trainer: {strategy: lightning_modules.strategies.TunedDDP}": "trainer.strategy",
    "trainer: {strategy: evil.Strategy}": "trainer.strategy",
    STRATEGY + "{process_group_backend: mpi}": "trainer.strategy.process_group_backend",
    STRATEGY + "{gradients: fp8}": "trainer.strategy.gradients",
    "trainer: {callbacks: [{class_path: Nothing}]}": "trainer.callbacks",
    "trainer: {callbacks: [{class_path: callbacks.RunCheckpoint, init_args: {dirpath: x}}]}": "trainer.callbacks",
    "trainer: {logger: {class_path: evil.Logger}}": "trainer.logger",
    "disable_callbacks: [preemption]": "disable_callbacks",
    # Files that are not there.
    "base: nowhere": "no config nowhere",
    "base: x": "no config x",
    "data: {init_args: {source: tokens, tokens_dir: nowhere}}": "data.tokens_dir",
    "ckpt_path: nowhere.ckpt": "no checkpoint nowhere.ckpt",
    "ckpt_path: best": "no best.ckpt",
    "ckpt_path: x.yaml": "checkpoint x.yaml",
    # Text that is no config.
    "trainer:\n  max_steps: 1\n  max_steps: 2": "x.yaml:3: key trainer.max_steps",
    "- a\n- b": "x.yaml: ",
    "words": "x.yaml: ",
    "trainer: [": "x.yaml:2: ",
    "\ttrainer: 1": "x.yaml:1: ",
}


@pytest.fixture(autouse=True)
def _no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A config that is let pass fails the test at once, before anything is trained."""

    def reached(self: RunCLI) -> None:
        raise AssertionError("the config was taken")

    monkeypatch.setattr(RunCLI, "before_fit", reached)


def wrong(cli, folder: Path, *arguments: str) -> str:
    """The one line on the standard error for `fit --config cpu_tiny` with some arguments; the rest of what is promised is checked."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    begun = time.monotonic()
    error = cli("fit", "--config", "cpu_tiny", *arguments).error
    assert time.monotonic() - begun < SECONDS
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert REMEDY.search(error), f"no remedy in: {error}"
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize("content", FILES)
def test_one_line_names_the_key_and_a_remedy(content: str, cli, tmp_path: Path) -> None:
    Path("x.yaml").write_text(content + "\n")
    assert wrong(cli, tmp_path, "--config", "x.yaml").startswith(FILES[content])


@pytest.mark.parametrize(
    ("name", "begin"),
    [
        ("folder", "config folder is a folder"),
        ("/proc/self/mem", "config /proc/self/mem cannot be read"),  # also by root
        ("latin.yaml", "latin.yaml is not UTF-8 text"),
        ("nowhere.yaml", "no config nowhere.yaml"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(name: str, begin: str, cli, tmp_path: Path) -> None:
    Path("folder").mkdir()
    Path("latin.yaml").write_bytes("base: für".encode("latin-1"))
    assert wrong(cli, tmp_path, "--config", name).startswith(begin)


def test_a_checkpoint_of_another_network_is_refused(cli, tmp_path: Path, finished_run: Path) -> None:
    error = wrong(cli, tmp_path, "--ckpt_path", str(finished_run / "checkpoints" / "last.ckpt"))
    assert error.startswith("the checkpoint is of another network: ")
    assert "model.network.model_dim=16" in error


def test_more_gpus_than_there_are_and_a_list_that_names_one_twice(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for devices, remedy in (
        ("3", "give at most 2"),
        ("[0, 0]", "give different numbers"),
        ("[0, 2]", "give different numbers from 0 to 1"),
    ):
        error = wrong(cli, tmp_path, "--trainer.accelerator", "gpu", "--trainer.devices", devices)
        assert error.startswith(f"trainer.devices is {devices}")
        assert remedy in error


def test_a_network_far_beyond_the_gpu_is_refused_unless_its_weights_are_divided(cli, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("mmrec.commandline.memory_check._memory", lambda *_: ("the GPU's memory is", 2**20))
    assert wrong(cli, tmp_path).startswith("model.network does not fit: weights, gradients and optimiser take ")
    with pytest.raises(AssertionError, match="the config was taken"):
        cli("fit", "--config", "cpu_tiny", "--trainer.strategy", "lightning.pytorch.strategies.ModelParallelStrategy")


def test_what_a_network_does_not_fit_is_named(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmrec.commandline.memory_check.os.sysconf", lambda name: 1024)
    message = wrong(cli, tmp_path, "--trainer.accelerator", "cpu")
    assert re.search(r"optimiser take [\d.]+ GiB, the host memory of this machine is 0\.0 GiB; give a smaller ", message)


def test_a_gpu_is_not_asked_for_its_memory_before_ranks_are_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that initialises CUDA, with which no forked rank could start."""
    asked = []
    properties = SimpleNamespace(total_memory=2**20)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: asked.append(index) or properties)
    for strategy, times in (("ddp_fork", 0), ("ddp_notebook", 0), ("ddp", 1), ("auto", 2)):
        config = Namespace(trainer=Namespace(strategy=strategy, accelerator="auto", precision=None), data=Namespace(), model=NETWORK)
        with pytest.raises(BadInputError, match=r"^model\.network does not fit: ") if times else nullcontext():
            check_memory(config)
        assert len(asked) == times


@pytest.mark.parametrize(
    ("strategy", "key", "seconds"),
    [
        (TunedDDPStrategy(timeout_seconds=544), "trainer.strategy.timeout_seconds", 544),
        (FSDP2Strategy(timeout_seconds=60), "trainer.strategy.timeout_seconds", 60),
        (DDPStrategy(timeout=timedelta(seconds=9)), "trainer.strategy.timeout", 9),
    ],
)
def test_a_watch_that_would_come_too_late_is_told_of(strategy: Strategy, key: str, seconds: int) -> None:
    def remark(strategy: Strategy, ranks: int = 2, **watch: float) -> str | None:
        return watch_remark(SimpleNamespace(strategy=strategy, world_size=ranks, callbacks=[RankWatch(**watch)]))

    assert remark(strategy) == (
        f"rank_watch.hang_after_seconds is 540, and by {key} a run that hangs ends after {seconds} s, before every rank's stacks are "
        "written; give it more than 544 s, or a lower rank_watch.hang_after_seconds"
    )
    assert remark(strategy, ranks=1) is None
    assert remark(strategy, hang_after_seconds=0) is None
    assert watch_remark(SimpleNamespace(strategy=strategy, world_size=2, callbacks=[])) is None
    assert remark(type(strategy)()) is None  # as everything is by default


def test_null_is_taken_where_the_trainer_has_a_default_of_its_own(cli) -> None:
    with pytest.raises(AssertionError, match="the config was taken"):
        cli("fit", "--config", "cpu_tiny", "--trainer.log_every_n_steps", "null")


def test_a_class_path_without_options_may_be_given_on_the_command_line(cli) -> None:
    with pytest.raises(AssertionError, match="the config was taken"):
        cli("fit", "--config", "cpu_tiny", "--trainer.strategy", TUNED)


def test_a_window_longer_than_the_tokens_is_refused(cli, tmp_path: Path, finished_run: Path, sample_cache: Path, monkeypatch) -> None:
    monkeypatch.setattr("mmrec.commandline.preflight.check_memory", lambda config: None)
    tokens = next(sample_cache.rglob("manifest.json")).parent
    options = ["--data.source", "tokens", "--data.tokens_dir", str(tokens), "--data.seq_len", "100000000"]
    assert wrong(cli, tmp_path, *options).startswith("data.seq_len=100000000 is more than the ")
