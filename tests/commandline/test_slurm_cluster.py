"""configs/slurm/fit.sbatch as it is, on a Slurm cluster of two nodes: preempted, requeued, and to the bit what nobody interrupted."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml
from cli_support import scalars
from local_slurm import LocalSlurm, what_is_missing
from signal_runs import weights
from support import same_tensors

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "configs" / "slurm" / "fit.sbatch"
STEPS = 40


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSlurm]:
    """A cluster of its own; without one the tests fail, since they were asked for by name."""
    if missing := what_is_missing():
        pytest.fail(missing)
    cluster = LocalSlurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def config(slurm: LocalSlurm, tiny_config: Path) -> Path:
    """Steps long enough to be told apart, a validation every tenth, no checkpoint but at the end."""
    content = yaml.safe_load(tiny_config.read_text())
    content["checkpoint_every"] = 1000
    content["trainer"] |= {"max_steps": STEPS, "val_check_interval": 10, "strategy": "ddp"}
    content["model"]["network"] |= {"model_dim": 128, "num_layers": 2}
    content["data"]["init_args"] |= {"seq_len": 256, "batch_size": 8}
    content["auxiliary_curves"] = {"diagnostics_every_n_steps": 0, "gradients_every_n_steps": 0}
    path = slurm.folder / "job.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def submit(slurm: LocalSlurm, config: Path, run: str, *options: str, before: Sequence[str] = ()) -> tuple[str, Path]:
    """The job's number and what it prints to; `before` are sbatch's options, `options` those of `fit`."""
    variables = {"REPOSITORY": str(ROOT), "CONFIG": str(config), "RUN": str(slurm.folder / run), "LOCAL": str(slurm.folder / "local")}
    variables |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}  # the nodes' names are no hosts
    here = ("--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", f"--output={run}.out")
    (slurm.folder / "local").mkdir(exist_ok=True)
    return slurm.call("sbatch", *here, *before, str(SCRIPT), *options, **variables), slurm.folder / f"{run}.out"


@pytest.fixture(scope="module")
def uninterrupted(slurm: LocalSlurm, config: Path) -> Path:
    """The folder of a job that nobody interrupted."""
    job, output = submit(slurm, config, "uninterrupted")
    state = slurm.wait_for(job, "COMPLETED", "FAILED")
    assert state == "COMPLETED", output.read_text()
    printed = output.read_text()
    assert printed.count("sum right") == 2
    assert "stopped by" not in printed
    return slurm.folder / "uninterrupted"


def test_a_requeued_job_ends_as_an_uninterrupted_one(slurm: LocalSlurm, config: Path, uninterrupted: Path) -> None:
    """Twice: by the signal that Slurm sends two minutes before the time is up, and by the one that it sends before it preempts."""
    job, output = submit(slurm, config, "requeued")
    folder = slurm.folder / "requeued"
    for start, (name, step) in enumerate((("USR1", 10), ("TERM", 30)), 1):
        slurm.wait_for_line(output, f"validation at step {step}:")
        slurm.call("scancel", f"--signal={name}", job)
        slurm.wait_for_line(output, f"job {job} is back in Slurm's queue", start)
        slurm.wait_for_line(output, f"job {job}, start {start + 1}, on ")
    state = slurm.wait_for(job, "COMPLETED", "FAILED")
    printed = output.read_text()
    assert state == "COMPLETED", printed
    assert printed.count("stopped by SIGUSR1 at step 1") == printed.count("stopped by SIGTERM at step 3") == 1
    assert printed.count("resumed from step ") == 2
    assert not (folder / "earlier").exists()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir() if not path.name.startswith(("step=", "best"))) == ["last.ckpt"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["num_nodes"] == 2
    assert len(list((folder / "tb").glob("events.*"))) == 3  # one a start: rank 0 alone writes
    assert same_tensors(weights(folder), weights(uninterrupted))
    for tag, count in (("train/loss", STEPS), ("train/grad_norm", STEPS), ("train/tokens", STEPS), ("val/loss", 1 + STEPS // 10)):
        assert len(scalars(uninterrupted, tag)) == count
        assert scalars(folder, tag) == scalars(uninterrupted, tag), tag


def test_a_task_of_an_array_is_put_back_alone(slurm: LocalSlurm, config: Path) -> None:
    """Of two that train at once, on a node each: the one whose number is the array's, by which Slurm means both."""
    array, _ = submit(slurm, config, "array", before=("--array=0-1", "--nodes=1", "--output=array-%a.out"))
    numbers = {slurm.number(f"{array}_{index}"): index for index in (0, 1)}
    index = numbers.pop(array)
    [other] = numbers.values()
    outputs = [slurm.folder / f"array-{place}.out" for place in (0, 1)]
    for output in outputs:
        slurm.wait_for_line(output, "validation at step 10:")
    slurm.call("scancel", "--signal=USR1", f"{array}_{index}")
    slurm.wait_for_line(outputs[index], f"job {array}_{index} is back in Slurm's queue")
    for output, place in zip(outputs, (0, 1), strict=True):
        state = slurm.wait_for(f"{array}_{place}", "COMPLETED", "FAILED")
        assert state == "COMPLETED", output.read_text()
    assert outputs[index].read_text().count("resumed from step 1") == 1
    assert "start 2" not in outputs[other].read_text()
    for place in (0, 1):  # neither has written where the other does
        folder = slurm.folder / "array" / str(place)
        assert len(scalars(folder, "train/loss")) == STEPS
        assert not (folder / "earlier").exists()


def test_a_cancelled_job_is_saved_and_stays_cancelled(slurm: LocalSlurm, config: Path) -> None:
    job, output = submit(slurm, config, "cancelled")
    slurm.wait_for_line(output, "validation at step 10:")
    slurm.call("scancel", job)
    slurm.wait_for_line(output, "not put back into Slurm's queue")
    assert slurm.wait_for(job, "CANCELLED") == "CANCELLED"
    assert "stopped by SIGTERM at step 1" in output.read_text()
    assert (slurm.folder / "cancelled" / "checkpoints" / "last.ckpt").is_file()


def test_a_node_that_lacks_something_stops_the_job(slurm: LocalSlurm, config: Path) -> None:
    """Before the first step; here a GPU."""
    content = yaml.safe_load(config.read_text())
    content["trainer"]["accelerator"] = "gpu"
    wants_gpu = slurm.folder / "gpu.yaml"
    wants_gpu.write_text(yaml.safe_dump(content))
    if os.path.exists("/dev/nvidia0"):
        pytest.fail("this machine has a GPU, and lacks nothing")
    job, output = submit(slurm, wants_gpu, "refused")
    assert slurm.wait_for(job, "FAILED", "COMPLETED") == "FAILED"
    assert f"error: a node lacks something; see {slurm.folder / 'refused'}/doctor-*.txt" in output.read_text()
    assert not (slurm.folder / "refused" / "checkpoints").exists()
