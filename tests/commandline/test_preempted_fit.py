"""`fit` of two ranks, told to stop: saved, at the same step, with the exit code a scheduler understands; resumed, equal to the bit.

The twenty runs and the stages carry the marker `faults`; with SIGNALS_JSON set to a file, what they came to is written there.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_support import scalars
from signal_runs import TWO_RANKS, SlowRun, Stopped, weights
from support import same_tensors

from mmrec.measuring.machine import machine
from mmrec.measuring.results import write_rows

STEPS = 24
LIMIT = 10.0  # seconds from the first signal to the end
NUMBERS = (signal.SIGTERM, signal.SIGUSR1)
RANKS = {"rank 0": (0,), "rank 1": (1,), "both": (0, 1)}
CASES = [(number, name, skew) for number in NUMBERS for name in RANKS for skew in (0.0, 0.3, 2.0)]
CASES += [(number, "all processes", 0.0) for number in NUMBERS]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path) -> Path:
    """Steps of two micro-batches, a data worker a rank, a validation every third step, no checkpoint but at the end."""
    content = yaml.safe_load(tiny_config.read_text())
    content["checkpoint_every"] = 1000
    content["trainer"] |= {"max_steps": STEPS, "accumulate_grad_batches": 2, "val_check_interval": 6}
    content["data"]["init_args"] |= {"num_workers": 1}
    content["auxiliary_curves"] = {"diagnostics_every_n_steps": 0, "gradients_every_n_steps": 0}
    path = tmp_path_factory.mktemp("signals") / "signals.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Path:
    """The folder of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    ended = SlowRun(folder, config, *TWO_RANKS, step_seconds=0).end()
    assert (ended.code, ended.step) == (0, STEPS), ended.output
    return folder


@pytest.fixture(scope="module")
def rows() -> Iterator[list[dict[str, Any]]]:
    """One a run; written at the end where a file is named."""
    found: list[dict[str, Any]] = []
    yield found
    if os.environ.get("SIGNALS_JSON"):
        common = {"ranks": 2, "backend": "gloo", **machine(torch.device("cpu"))}
        write_rows(Path(os.environ["SIGNALS_JSON"]), [row | common for row in found])


def require_stopped(stopped: Stopped, number: signal.Signals, folder: Path, code: int = 143) -> None:
    """The run says what happened, in one line, and left so."""
    assert stopped.code == code, stopped.output
    assert 0 < stopped.step < STEPS, stopped.output
    last = folder / "checkpoints" / "last.ckpt"
    told = f"stopped by {number.name} at step {stopped.step}, saved to {last}; --ckpt_path last goes on"
    assert stopped.output.count("stopped by") == stopped.output.count(told) == 1, stopped.output


def require_same(folder: Path, other: Path) -> None:
    """Two runs ended with the same parameters, and their curves are the same, to the bit."""
    assert same_tensors(weights(folder), weights(other))
    for tag in ("train/loss", "train/grad_norm", "train/tokens", "val/loss"):
        assert scalars(folder, tag) == scalars(other, tag), tag


@pytest.mark.timeout(900)  # five starts of two ranks; a minute on idle cores
def test_stopped_three_times_and_resumed_to_the_bit(tmp_path: Path, config: Path, uninterrupted: Path) -> None:
    folder, before = tmp_path / "run", 0
    for number, ranks, skew in ((signal.SIGTERM, (1,), 0.0), (signal.SIGUSR1, (0,), 0.0), (signal.SIGTERM, (0, 1), 0.3)):
        run = SlowRun(folder, config, *TWO_RANKS, "--ckpt_path", "last")
        processes = run.at_step(before + 3)
        stopped = run.send(number, [processes[rank] for rank in ranks], skew)
        require_stopped(stopped, number, folder)
        assert stopped.step > before
        before = stopped.step
    ended = SlowRun(folder, config, *TWO_RANKS, "--ckpt_path", "last", step_seconds=0).end()
    assert (ended.code, ended.step) == (0, STEPS), ended.output
    assert "stopped by" not in ended.output
    require_same(folder, uninterrupted)


@pytest.mark.timeout(600)
def test_ctrl_c_saves_and_a_second_one_interrupts(tmp_path: Path, config: Path) -> None:
    """A terminal sends it to all processes of the run, the data workers too."""
    folder = tmp_path / "run"
    run = SlowRun(folder, config, *TWO_RANKS)
    run.at_step(3)
    stopped = run.send(signal.SIGINT, run.everybody())
    require_stopped(stopped, signal.SIGINT, folder, code=130)
    assert stopped.output.count("Ctrl-C: the run saves at the end of this step and leaves; once more to leave at once") == 1
    assert "Traceback" not in stopped.output
    again = SlowRun(folder, config, *TWO_RANKS, "--ckpt_path", "last", step_seconds=30.0)  # so that the second finds the first's step
    processes = again.at_step(stopped.step + 1)
    for process in processes:
        os.kill(process, signal.SIGINT)
    while "once more to leave at once" not in again.output():  # of rank 0
        assert again.process.poll() is None, again.output()
        time.sleep(0.05)
    interrupted = again.send(signal.SIGINT, processes)
    assert interrupted.code not in (0, 130, 143)
    assert interrupted.step == stopped.step


@pytest.mark.faults
@pytest.mark.parametrize(("number", "who", "skew"), CASES, ids=[f"{n.name}-{who}-{skew:g}s" for n, who, skew in CASES])
def test_signals(
    number: signal.Signals, who: str, skew: float, tmp_path: Path, config: Path, uninterrupted: Path, rows: list[dict[str, Any]]
) -> None:
    """One rank is signalled twice, both one after the other; a scheduler signals all processes, the data workers too."""
    folder, chance = tmp_path / "run", random.SystemRandom()
    long = skew > 1  # steps so long that the second signal still finds the run
    run = SlowRun(folder, config, *TWO_RANKS, step_seconds=0.8 if long else 0.05)
    processes = run.at_step(chance.randrange(1, 3) if long else chance.randrange(1, 12))
    if who == "all processes":
        processes = run.everybody()
        assert len(processes) == 8  # a worker a rank, its server, and Python's tracker of semaphores
    else:
        chosen = [processes[rank] for rank in chance.sample(RANKS[who], len(RANKS[who]))]
        processes = chosen if len(chosen) == 2 or not skew else chosen * 2
    stopped = run.send(number, processes, skew)
    require_stopped(stopped, number, folder)
    assert stopped.seconds < LIMIT
    ended = SlowRun(folder, config, *TWO_RANKS, "--ckpt_path", "last", step_seconds=0).end()
    assert (ended.code, ended.step) == (0, STEPS), ended.output
    require_same(folder, uninterrupted)
    case = {"signal": number.name, "to": who, "skew_seconds": skew, "batch_seconds": 0.8 if long else 0.05}
    rows.append(case | {"saved_step": stopped.step, "seconds_to_stop": round(stopped.seconds, 2), "exit_code": stopped.code, "equal": True})


# The stage in which one rank is signalled, how many ranks come there, and what is expected.
STAGES = {
    "setup": (2, 143, False),
    "sanity": (2, 143, False),
    "validation": (2, 143, True),
    "saving": (1, 143, True),
    "teardown": (2, 0, True),
}


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("stage", list(STAGES))
def test_a_signal_at_any_stage(
    stage: str, rank: int, tmp_path: Path, config: Path, uninterrupted: Path, rows: list[dict[str, Any]]
) -> None:
    """What is under way is finished: before the first step there is nothing to save, behind the last the run has ended by itself."""
    ranks, code, saved = STAGES[stage]
    folder = tmp_path / "run"
    options = (*TWO_RANKS, "--checkpoint_every", "4")
    run = SlowRun(folder, config, *options, step_seconds=0.02, stage=stage)
    processes = run.at_stage(stage, ranks)
    if rank >= ranks:  # it waits for the one that saves
        processes = run.at_step(1)
    stopped = run.send(signal.SIGTERM, [processes[rank]])
    assert stopped.code == code, stopped.output
    assert stopped.seconds < LIMIT
    assert (stopped.step > 0) == saved
    if code:
        assert stopped.output.count("stopped by SIGTERM") == 1
        if not saved:
            assert "at step 0, before a step was taken: there is nothing to save" in stopped.output
        ended = SlowRun(folder, config, *options, "--ckpt_path", "last", step_seconds=0).end()
        assert (ended.code, ended.step) == (0, STEPS), ended.output
    require_same(folder, uninterrupted)
    case = {"signal": "SIGTERM", "to": f"rank {rank}", "during": stage, "saved_step": stopped.step}
    rows.append(case | {"seconds_to_stop": round(stopped.seconds, 2), "exit_code": stopped.code, "equal": True})


@pytest.mark.faults
def test_one_process(tmp_path: Path, config: Path) -> None:
    run = SlowRun(tmp_path / "run", config)
    require_stopped(run.send(signal.SIGTERM, run.at_step(4, ranks=1)), signal.SIGTERM, tmp_path / "run")
