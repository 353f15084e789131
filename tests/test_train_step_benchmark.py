"""benchmarks/train_step.py: every case can be built, the tiny ones run, failures become rows with a reason."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from processes import environment

from lightning_modules import MMRecLightningModule
from mmrec.config import MMRecConfig
from mmrec.model import MMRecModel

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
KEYS = {
    "case", "config", "params_m", "uboo", "B", "T", "gpus", "strategy", "precision", "optimizer", "compile", "fp8", "checkpointing",
    "tokens_per_s", "ms_per_step", "mfu", "peak_gib", "first_step_s", "peers", "host_ms", "torch", "triton", "gpu", "date",
}  # fmt: skip


@pytest.fixture
def train_step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("train_step")


def command_line(*arguments: str) -> list[str]:
    return [sys.executable, str(BENCHMARKS / "train_step.py"), *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command_line(*arguments), env=environment(), capture_output=True, text=True, timeout=200, check=False)


def test_the_tiny_cases_run_on_a_cpu(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    output.write_text(json.dumps([{"case": "tiny", "config": "stale"}, {"case": "370m", "config": "h100_370m", "B": 8, "T": 2048}]))
    done = run("--only", "tiny,tiny_planning", "--output", str(output), "--profile", "--warmup", "1", "--steps", "2")
    assert done.returncode == 0, done.stderr
    kept, step, off, on = json.loads(output.read_text())
    assert kept["case"] == "370m"
    for row in (step, off, on):
        assert row.keys() >= KEYS
    assert step["tokens_per_s"] == pytest.approx(2 * 64 / step["ms_per_step"] * 1e3)
    assert step["mfu"] is None  # no such peak of a CPU
    assert step["peak_gib"] > 0
    assert step["loss_step"] == 1 + 2 + 3 + 1 + 1  # warm-up, timed, the host's, profiled, the one that logs
    assert step["command"].startswith("python benchmarks/train_step.py --only tiny,tiny_planning --output rows.json --profile ")
    assert (off["uboo"], on["uboo"]) == (False, True)
    config = MMRecConfig(vocab_size=4096, model_dim=128, num_layers=2, num_heads=2)
    assert off["params_m"] == pytest.approx(MMRecModel(config).num_parameters(training_only=False) / 1e6)
    assert (on["weights_gib"] - off["weights_gib"]) * 2**30 == pytest.approx(2 * 2 * 128 * 128 * 4)
    assert "operators" in done.stdout
    assert "tokens/s" in done.stdout


def test_a_failure_is_a_row_with_its_reason(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    done = run("--only", "tiny", "--seconds", "0.01", "--output", str(output))
    assert done.returncode == 1
    (row,) = json.loads(output.read_text())
    assert row["failed"] == "no answer within 0 s"
    assert "NOT MEASURED: tiny at B 2" in done.stdout


def test_a_killed_run_leaves_no_worker_behind(tmp_path: Path) -> None:
    """It would keep the GPU from whatever is measured next."""
    command = command_line("--only", "tiny", "--steps", "100000", "--output", str(tmp_path / "rows.json"))
    with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
        while not children.read_text():
            assert running.poll() is None
            time.sleep(0.1)
        (worker,) = children.read_text().split()
        running.kill()
    deadline = time.monotonic() + 60
    while is_running(worker):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_running(process: str) -> bool:
    """Also not where it has ended and nobody has asked for its exit code."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_bad_cases_are_named() -> None:
    assert "no case 371m; did you mean 370m?" in run("--only", "371m").stderr
    assert "no CUDA device for 370m; --only tiny" in run("--only", "370m").stderr


def test_a_setting_makes_a_row_of_its_own(train_step: ModuleType) -> None:
    case = train_step.CASES["370m"].changed(["network.loss_chunk_size=8192", "model.compile_blocks=false"])
    assert case.name == "370m network.loss_chunk_size=8192 model.compile_blocks=false"
    settings = case.settings()
    assert settings["network"]["loss_chunk_size"] == 8192
    assert settings["model"]["compile_blocks"] is False
    assert "--set: compile_blocks=1 is no setting; give network.NAME=VALUE" in run("--only", "tiny", "--set", "compile_blocks=1").stderr
    spelt_as_in_fit = train_step.CASES["370m"].changed(["model.network.pe_dim=512"])
    assert (spelt_as_in_fit.name, spelt_as_in_fit.settings()["network"]["pe_dim"]) == ("370m network.pe_dim=512", 512)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--set", "model.network.pe_dims=3"], "--set: no network.pe_dims; did you mean network.pe_dim?"),
        (["--set", "model.compile_block=true"], "--set: no model.compile_block; did you mean model.compile_blocks?"),
        (["--set", "trainer.precison=16"], "--set: no trainer.precison; did you mean trainer.precision?"),
        (["--set", "trainer.max_steps=4"], "--set: trainer.max_steps is the script's own; give --steps"),
        (["--set", "trainer.callbacks=null"], "--set: trainer.callbacks is the script's own; leave it out"),
        (["--set", "network.pe_dim=0"], "--set: pe_dim is 0; give a whole number of at least 1"),
        (["--batch", "0"], "--batch: '0' is no whole number of at least 1"),
        (["--seconds", "0"], "--seconds: '0' is no number of seconds above 0"),
        (["--memory-gib", "-1"], "--memory-gib: -1.0 is no memory"),
        (["--output", "missing/rows.json"], "--output: no folder missing; make it first"),
        (["--stepps", "3"], "unknown option --stepps; did you mean --steps?"),
    ],
)
def test_bad_options_are_one_line(train_step: ModuleType, options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        train_step.main(["--only", "tiny", *options])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


def test_every_case_can_be_built(train_step: ModuleType) -> None:
    for name, case in train_step.CASES.items():
        assert case.name == name
        settings = case.settings()
        assert settings["trainer"]["gradient_clip_val"] == 1.0
        config = MMRecConfig(**settings["network"])
        with torch.device("meta"):
            module = MMRecLightningModule(config, **settings["model"])
        assert module.config == config
    assert set(train_step.DEFAULT) <= train_step.CASES.keys()


def test_what_the_table_asks_for(train_step: ModuleType) -> None:
    """Sizes, batches and settings of the rows that have bars."""
    cases = train_step.CASES
    assert cases["370m_b16"].batches[0] * cases["370m_b16"].seq_len == cases["370m_long"].batches[0] * cases["370m_long"].seq_len

    def parameters(name: str) -> float:
        with torch.device("meta"):
            return MMRecModel(MMRecConfig(**cases[name].settings()["network"])).num_parameters() / 1e6

    assert parameters("370m") == pytest.approx(368, rel=0.005)
    assert parameters("1b3") == pytest.approx(1270, rel=0.005)
    assert parameters("7b_8bit") == pytest.approx(6600, rel=0.01)
    for name in ("7b_8bit", "7b_bf16"):
        settings = cases[name].settings()
        assert settings["trainer"]["precision"] == "bf16-true"
        assert settings["network"]["activation_checkpointing"]
    assert cases["370m"].settings()["trainer"]["precision"] == "bf16-mixed"


def test_peers_stand_beside_the_row_of_the_same_batch(train_step: ModuleType) -> None:
    shape: dict[str, Any] = {"T": 2048, "gpu": "a", "config": "h100_370m"}
    rows = [
        {"case": "370m", "B": 8, "peers": {}, **shape},
        {"case": "370m_b16", "B": 16, "peers": {}, **shape},
        {"case": "llama", "B": 8, "peers": {}, "tokens_per_s": 5.0, **shape, "config": "LlamaForCausalLM"},
    ]
    train_step.with_peers(rows)
    assert [row["peers"] for row in rows] == [{"hf_llama_374m": 5.0}, {}, {}]


def test_a_case_falls_back_to_the_batch_that_fits(train_step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def measure(name: str, batch: int, options: Any) -> dict[str, Any]:
        tried.append(batch)
        return {"failed": "OutOfMemoryError: CUDA out of memory", "out_of_memory": True} if batch > 4 else {"rows": [{"B": batch}]}

    monkeypatch.setattr(train_step, "measure", measure)
    options = train_step.parse(["--only", "tiny"])
    assert train_step.rows_of("1b3", options, {}) == [{"B": 4}]
    assert tried == [12, 8, 4]
