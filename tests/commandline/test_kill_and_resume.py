"""Killed at a random moment and resumed, a run goes on as if nothing had happened: equal to the bit, from every source."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from cli_support import VOCABULARY, event_files, fit, scalars, scalars_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules.prepare import prepare
from datamodules.sample_text import SampleText

ENDLESS = 1_000_000


@pytest.fixture
def config(request: pytest.FixtureRequest, tiny_config: Path, tmp_path: Path) -> Path:
    """The tiny config with the source asked for, over text made here."""
    content = yaml.safe_load(tiny_config.read_text())
    if request.param != "sample":
        lines = [json.dumps({"text": document["text"], "timestamp": "", "url": ""}) for document in SampleText(3).documents(120)]
        Path("text.jsonl").write_text("\n".join(lines), encoding="utf-8")
        manifest = prepare("text.jsonl", "tokens", vocab_size=VOCABULARY, validation_fraction=0.1, workers=0, progress=False)
        options = {"source": request.param, "seq_len": 16, "batch_size": 2, "validation_batches": 1}
        if request.param == "local":
            options |= {"tokenizer": f"tokens/{manifest['tokenizer']['file']}", "train_files": "text.jsonl", "validation_fraction": 0.1}
        else:
            options |= {"tokens_dir": "tokens"}
        content["data"]["init_args"] = options
    content["checkpoint_every"] = 3
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("config", ["sample", "local", "tokens"], indirect=True)
def test_a_killed_run_resumes_to_the_bit(config: Path) -> None:
    last = Path("killed/checkpoints/last.ckpt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = ["--trainer.default_root_dir", "killed", "--trainer.max_steps", str(ENDLESS)]
    command = [sys.executable, "-m", "mmrec.cli", "fit", "--config", str(config), *options]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not last.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no checkpoint within two minutes"
        time.sleep(0.01)
    time.sleep(random.SystemRandom().uniform(0.0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL

    saved = torch.load(last, weights_only=True, mmap=True)["global_step"]
    assert saved >= 3
    time.sleep(1.1)  # TensorBoard reads event files in the order of their names, which tell the second they were begun in
    steps = str(saved + 5)
    fit(config, "--trainer.default_root_dir", "killed", "--ckpt_path", "last", "--trainer.max_steps", steps)
    fit(config, "--trainer.default_root_dir", "straight", "--trainer.max_steps", steps)
    for tag in ("train/loss", "train/loss_aux", "train/grad_norm", "train/tokens"):
        resumed, straight = scalars(Path("killed"), tag), scalars(Path("straight"), tag)
        assert len(straight) == saved + 5
        assert {step: resumed[step] for step in straight} == straight, f"killed after the checkpoint of step {saved}: {tag}"
    # What was compared did come from both starts: the second took up where the checkpoint was, and did not begin anew.
    first, second = event_files(Path("killed"))
    assert set(scalars_of(second, "train/loss")) == set(range(saved, saved + 5))
    assert set(scalars_of(first, "train/loss")) >= set(range(saved))
    # TensorBoard forgets what the first start logged behind its checkpoint: all but the one step at the checkpoint is there once.
    events = EventAccumulator("killed/tb", size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] in (
        [*range(saved), *range(saved, saved + 5)],
        [*range(saved + 1), *range(saved, saved + 5)],
    )
    weights = [torch.load(Path(run, "checkpoints", "last.ckpt"), weights_only=True)["state_dict"] for run in ("killed", "straight")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
