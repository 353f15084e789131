"""How a stopped run asks Slurm for another start, and with which code it leaves; Slurm's programs are stood in for by scripts."""

import os
import re
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment

from callbacks import Preemption
from mmrec.commandline.slurm import RequeueError, requeue, slurm_job
from mmrec.commandline.stopping import leave_if_stopped

SCRIPT = Path(__file__).parents[2] / "configs" / "slurm" / "fit.sbatch"
TELL_JOBS = """
while read -r number array index state; do
  case "${!#}" in *%A*) echo $number $array $index $state;; *) echo $state;; esac  # the last argument: a format
done""".strip()
# Three tasks of an array: the one that has not begun, or began last, has the array's number as its own, by which all are listed.
ARRAY = "9 7 1 PENDING\n7 7 2 RUNNING\n8 7 0 RUNNING"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`slurm(state, refuses, jobs)` puts `squeue` and `scontrol` on the path; what `scontrol` was called with goes to the file it returns.

    `squeue` tells of job 7, in a state or gone, or of `jobs`: one a line, with its number, its array's, its index there and its state.
    """

    def install(state: str = "RUNNING", refuses: str = "", jobs: str = "") -> Path:
        programs, calls = tmp_path / "bin", tmp_path / "calls"
        programs.mkdir()
        jobs = jobs or (f"7 7 N/A {state}" if state else "")
        scripts = {"squeue": f"{TELL_JOBS} <<END\n{jobs}\nEND", "scontrol": f'echo "$@" >> {calls}'}
        if refuses:
            scripts["scontrol"] = f'echo "{refuses}" >&2; exit 1'
        for name, script in scripts.items():
            (programs / name).write_text(f"#!/bin/bash\n{script}\n")
            (programs / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        return calls

    return install


def stopped(saved: Path | None = Path("runs/x/last.ckpt"), requeue: bool = True, step: int = 5) -> Preemption:
    preemption = Preemption(requeue)
    preemption.stopped_by, preemption.stopped_at, preemption.saved = signal.SIGTERM, step, saved
    return preemption


def trainer(rank: int = 0, environment: Any = None) -> Any:
    strategy = SimpleNamespace(launcher=None, cluster_environment=environment)
    return SimpleNamespace(strategy=strategy, local_rank=rank, global_rank=rank, is_global_zero=rank == 0)


def leave(preemption: Preemption, rank: int = 0, environment: Any = None) -> int:
    with pytest.raises(SystemExit) as end:
        leave_if_stopped(trainer(rank, environment), preemption)
    assert isinstance(end.value.code, int)
    return end.value.code


def test_a_running_job_is_put_back(slurm: Any) -> None:
    calls = slurm()
    assert slurm_job() == "7"
    assert requeue("7") == ("7", None)
    assert calls.read_text() == "requeue 7\n"


def test_a_task_of_an_array_is_put_back_alone(slurm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    calls = slurm(jobs=ARRAY)
    assert leave(stopped()) == 0
    assert calls.read_text() == "requeue 7_2\n"  # of `requeue 7` all three would begin anew
    assert capsys.readouterr().out.endswith("job 7_2 is back in Slurm's queue\n")


def test_a_task_of_an_array_has_its_own_state(slurm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    calls = slurm(jobs=ARRAY.replace("2 RUNNING", "2 COMPLETING"))
    assert leave(stopped()) == 143
    assert capsys.readouterr().out.endswith("job 7_2 is COMPLETING: not put back into Slurm's queue\n")
    assert not calls.exists()


def test_a_job_that_a_task_of_an_array_has_submitted_is_no_task(slurm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch hands the task's variables on to it."""
    calls = slurm()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert leave(stopped()) == 0
    assert calls.read_text() == "requeue 7\n"


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", ""])
def test_a_job_that_is_being_ended_is_left_alone(state: str, slurm: Any) -> None:
    calls = slurm(state)
    assert requeue("7") == ("7", state or "gone")
    assert not calls.exists()


def test_a_refusal_is_one_line(slurm: Any) -> None:
    slurm(refuses="Job is no batch job")
    with pytest.raises(RequeueError, match=r"^scontrol requeue 7: Job is no batch job$"):
        requeue("7")


def test_a_missing_program_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RequeueError, match=r"^squeue .*No such file"):
        requeue("7")


def test_a_run_that_ended_by_itself_returns(slurm: Any) -> None:
    calls = slurm()
    leave_if_stopped(trainer(), Preemption())
    assert not calls.exists()


def test_exit_codes_outside_slurm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert leave(stopped()) == 143
    assert capsys.readouterr().out == "stopped by SIGTERM at step 5, saved to runs/x/last.ckpt; --ckpt_path last goes on\n"
    assert leave(stopped(), 1) == 143  # started by a scheduler as well
    assert leave(stopped(), 1, LightningEnvironment()) == 0  # by rank 0, which tells
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("preemption", "told"),
    [
        (stopped(None), "not saved: trainer.enable_checkpointing is false"),
        (stopped(None, step=0), "before a step was taken: there is nothing to save"),
    ],
)
def test_what_is_not_saved_is_said(
    preemption: Preemption, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert leave(preemption) == 143
    assert capsys.readouterr().out == f"stopped by SIGTERM at step {preemption.stopped_at}, {told}\n"


def test_exit_codes_under_slurm(slurm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    calls = slurm()
    environment = object.__new__(SLURMEnvironment)
    assert leave(stopped(), 0, environment) == 0
    assert capsys.readouterr().out.endswith("job 7 is back in Slurm's queue\n")
    assert leave(stopped(), 1, environment) == 0
    assert calls.read_text() == "requeue 7\n"  # once
    assert leave(stopped(requeue=False), 0, environment) == leave(stopped(requeue=False), 1, environment) == 143
    assert calls.read_text() == "requeue 7\n"


def test_a_cancelled_job_ends(slurm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    slurm("COMPLETING")
    assert leave(stopped()) == 143
    assert capsys.readouterr().out.endswith("job 7 is COMPLETING: not put back into Slurm's queue\n")


def test_a_refusal_ends_with_its_own_code(slurm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    slurm(refuses="no")
    assert leave(stopped()) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: Slurm did not put job 7 back into its queue: scontrol requeue 7: no; submit it again, or")
    assert len(captured.err.splitlines()) == 1
    assert "stopped by SIGTERM at step 5, saved to" in captured.out


def run_script(folder: Path, **variables: str) -> list[str]:
    """What fit.sbatch, with two nodes of two tasks, calls `srun` with: a line each."""
    program, calls = folder / "bin" / "srun", folder / "srun_calls"
    program.parent.mkdir()
    program.write_text(f'#!/bin/bash\necho "$@" >> {calls}\n')
    program.chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_ON_NODE": "8", "SLURM_NODELIST": "n[1-2]"}
    places = {"REPOSITORY": str(folder), "SLURM_SUBMIT_DIR": str(folder), "PATH": f"{program.parent}:{os.environ['PATH']}"}
    arguments = ["bash", str(SCRIPT), "--model.learning_rate", "1e-4"]
    subprocess.run(arguments, env=job | places | variables, cwd=folder, check=True, capture_output=True, timeout=60)
    return calls.read_text().splitlines()


def test_the_script_checks_each_node_and_then_trains(tmp_path: Path) -> None:
    *checks, last = run_script(tmp_path, CONFIG="mine.yaml")
    assert [check.count(" doctor --") for check in checks] == [1, 1]
    assert " .venv/bin/python -m mmrec.cli fit --config mine.yaml --ckpt_path last --trainer.default_root_dir runs/mine " in last
    assert last.endswith(" --trainer.num_nodes 2 --trainer.devices 2 --model.learning_rate 1e-4")


def test_the_script_runs_in_a_container_and_an_array_in_folders(tmp_path: Path) -> None:
    calls = run_script(tmp_path, PYTHON="/opt/in_container.sh", SLURM_ARRAY_TASK_ID="3")
    assert len(calls) == 3
    assert all("/opt/in_container.sh" in call and ".venv" not in call for call in calls)
    assert "--trainer.default_root_dir runs/a100_7b/3 " in calls[-1]


@pytest.mark.parametrize("option", ["time", "partition", "account", "mem"])
def test_the_script_names_what_a_cluster_may_ask_for(option: str) -> None:
    """In a comment that one # less makes an option; nothing of it holds as it is."""
    text = SCRIPT.read_text()
    before_code = text.partition("\nset -euo pipefail")[0]
    assert re.search(rf"^##SBATCH --{option}=", before_code, re.MULTILINE)
    assert not re.search(rf"^#SBATCH --{option}\b", text, re.MULTILINE)
