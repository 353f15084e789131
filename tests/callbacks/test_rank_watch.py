"""Of two ranks none goes on alone: whatever ends one, both end soon, and the first fault is named first."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fault_run
import pytest
import torch
from processes import environment, session
from ranks import train_on_ranks

from callbacks import BackgroundCheckpointIO, RankWatch, rank_watch
from callbacks.rank_watch import _is_of_peers

SCRIPT = Path(__file__).parents[1] / "fault_run.py"
QUICK = {"interval_seconds": 0.5, "dead_after_seconds": 6.0, "hang_after_seconds": 60.0}


def run(folder: Path, faults: list[dict[str, Any]], watch: dict[str, Any] | None = None, **options: Any) -> tuple[int, str, float]:
    """Exit code of rank 0, what all ranks said on the standard error, and seconds until every process had ended."""
    options = {"folder": str(folder), "faults": faults, "watch": watch or QUICK, "devices": 2, "strategy": "ddp", "max_steps": 20} | options
    begin = time.monotonic()
    with open(folder / "stderr", "w+b") as errors:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), json.dumps(options)],
            env=environment(),
            cwd=folder,
            stdout=errors,
            stderr=errors,
            start_new_session=True,
        )
        code = process.wait(120)
        while left := session(process.pid):  # the other rank, which is nobody's child once rank 0 has gone
            if time.monotonic() - begin > 120:
                for rank in left:
                    os.kill(rank, signal.SIGKILL)
                pytest.fail("a rank is left over")
            time.sleep(0.1)
        errors.seek(0)
        return code, errors.read().decode(), time.monotonic() - begin


def first_line(errors: str, pattern: str) -> str:
    """The first line in which a rank speaks of a fault; what torch's own C++ logs about a closed connection lies before."""
    spoken = re.compile(r"^rank \d|\[rank: \d\]|^\w*Error|^Traceback")
    line = next(line for line in errors.splitlines() if spoken.search(line))
    assert re.search(pattern, line), errors
    return line


def test_a_rank_that_raises_is_named_first_and_ends_the_other(tmp_path: Path) -> None:
    code, errors, seconds = run(tmp_path, [{"kind": "raise", "rank": 1, "step": 3}])
    assert code != 0
    assert seconds < 60
    first_line(errors, r"^rank 1 failed: ValueError: no more tea on rank 1$")


def test_kill_9_of_the_rank_that_holds_the_store(tmp_path: Path) -> None:
    code, errors, seconds = run(tmp_path, [{"kind": "kill", "rank": 0, "step": 3}])
    assert code == -9
    assert seconds < 60
    first_line(errors, r"^rank 1 ends, since rank 0 has ended: its store cannot be reached")


def test_a_hang_ends_by_timeout_with_the_stacks_of_both(tmp_path: Path) -> None:
    code, errors, seconds = run(tmp_path, [{"kind": "sleep", "rank": 1, "step": 3}], QUICK | {"hang_after_seconds": 15.0})
    assert code != 0
    assert seconds < 60
    assert "hangs: nothing new for " in errors
    one, other = (errors.partition(f"stacks of rank {rank}:\n")[2].partition("stacks of rank")[0] for rank in range(2))
    assert "training_epoch_loop.py" in one  # waits for the other in a collective
    assert "fault_run.py" in other
    assert "in on_train_batch_start" in other


def test_a_stopped_rank_is_named_by_the_one_that_waits_for_it_and_does_not_stay_behind(tmp_path: Path) -> None:
    """It beats no more, but what the other finds first is that itself has come to nothing new."""
    watch = {"interval_seconds": 0.5, "dead_after_seconds": 100.0, "hang_after_seconds": 100.0}
    code, errors, _ = run(tmp_path, [{"kind": "impatient", "rank": 0, "step": 3}, {"kind": "stop", "rank": 1, "step": 3}], watch)
    assert code == 1
    first_line(errors, r"^rank 0 ends, since rank 1 is dead: no sign of life for \d+ s$")
    assert "training_epoch_loop.py" in errors.partition("stacks of rank 0:\n")[2]


def test_a_rank_that_fails_leaves_no_stopped_one_behind(tmp_path: Path) -> None:
    faults = [{"kind": "stop", "rank": 1, "step": 3}, {"kind": "raise", "rank": 0, "step": 3}]
    code, errors, _ = run(tmp_path, faults)
    assert code == 1
    first_line(errors, r"^rank 0 failed: ValueError: no more tea on rank 0$")


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["raise", "kill"])
@pytest.mark.parametrize("step", [0, 7])
@pytest.mark.parametrize("watch", [QUICK, {}], ids=["quick", "default"])
def test_any_rank_any_way(kind: str, rank: int, step: int, watch: dict[str, float], tmp_path: Path) -> None:
    """Lightning's own observer may be the first to end rank 0 when a child of it has gone; it names the rank as well."""
    code, errors, seconds = run(tmp_path, [{"kind": kind, "rank": rank, "step": step}], watch, data={"batch_size": 2})
    assert code != 0
    assert seconds < 60, errors
    if kind == "raise":
        first_line(errors, rf"^rank {rank} failed: ValueError: no more tea on rank {rank}$")
    else:
        first_line(errors, rf"since rank {rank} |\[rank: {rank}\] Child process with PID \d+ terminated with code -9")


def test_a_run_that_ends_well_is_let_go(tmp_path: Path) -> None:
    assert [len(result["norms"]) for result in train_on_ranks({"folder": tmp_path, "watch": QUICK, "max_steps": 3}, 2)] == [3, 3]


def test_one_process_is_not_watched(tmp_path: Path) -> None:
    trainer = fault_run.train({"folder": tmp_path, "watch": QUICK, "max_steps": 2})
    (watch,) = [callback for callback in trainer.callbacks if isinstance(callback, RankWatch)]
    assert watch._monitor is None


def test_a_process_ends_after_the_checkpoint_that_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io, let = BackgroundCheckpointIO(), threading.Event()
    real = torch.save
    monkeypatch.setattr(torch, "save", lambda *arguments: (let.wait(60), real(*arguments)))
    io.save_checkpoint({"step": 1}, tmp_path / "a.ckpt")
    there: list[bool] = []
    monkeypatch.setattr(os, "_exit", lambda code: there.append((tmp_path / "a.ckpt").exists()))
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(checkpoint_io=io, launcher=None))
    monkeypatch.setattr(rank_watch, "_WRITE_SECONDS", 0.01)
    rank_watch._leave(trainer, 1)
    monkeypatch.setattr(rank_watch, "_WRITE_SECONDS", 60.0)
    let.set()
    rank_watch._leave(trainer, 1)
    assert there == [False, True]
    io.teardown()


def test_which_errors_come_from_another_rank() -> None:
    assert _is_of_peers(RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]"))
    assert _is_of_peers(RuntimeError("NCCL communicator was aborted on rank 1."))
    assert not _is_of_peers(ValueError("the ranks disagree"))
    assert not _is_of_peers(RuntimeError("CUDA out of memory"))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"rank_watch\.interval_seconds is 0; give a number above 0"):
        RankWatch(interval_seconds=0)
    with pytest.raises(ValueError, match=r"rank_watch\.dead_after_seconds is 5; give at least three intervals, 6"):
        RankWatch(dead_after_seconds=5)
    with pytest.raises(ValueError, match=r"rank_watch\.hang_after_seconds is -1; give seconds, or 0 for never"):
        RankWatch(hang_after_seconds=-1)
