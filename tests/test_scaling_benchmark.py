"""benchmarks/scaling.py: that it measures, how it joins what ranks say, and what it refuses."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from processes import environment

from mmrec.commandline.configs import shipped_configs

FOLDER = Path(__file__).parents[1] / "benchmarks"
OWN_OPTIONS = """
base: cpu_tiny
trainer:
  strategy:
    class_path: lightning_modules.strategies.TunedDDPStrategy
    init_args: {gradients: bf16, bucket_cap_mb: 9}
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("scaling")
    for name in [name for name in sys.modules if name.startswith(("scaling", "train_step"))]:
        del sys.modules[name]


def answer(ms: float, peak: float) -> dict[str, object]:
    times = {"ms_per_step": ms, "ms_fastest": ms - 1, "ms_slowest": ms + 1}
    memory = {"peak_gib": peak, "reserved_gib": peak + 1, "in_use_gib": peak + 2}
    sent = {"communication_ms": ms / 10, "communication_hidden": peak / 10}
    return {**times, **memory, **sent, "B": 2, "T": 50, "accumulate": 3, "flops_per_token": 7, "flops_peak": 1e5}


def test_a_row_is_of_the_slowest_rank_and_the_fullest_gpu(script: ModuleType) -> None:
    row = script.joined([answer(90.0, 5.0), answer(100.0, 4.0)])
    assert row["tokens_per_s_per_gpu"] == pytest.approx(3000)
    assert row["tokens_per_s"] == pytest.approx(6000)
    assert row["mfu"] == pytest.approx(3000 * 7 / 1e5)
    assert (row["ms_per_step"], row["ms_fastest"], row["peak_gib"], row["reserved_gib"]) == (100.0, 99.0, 5.0, 6.0)
    assert row["peak_gib_by_gpu"] == [5.0, 4.0]
    assert row["in_use_gib"] == 7.0
    assert (row["communication_ms"], row["communication_hidden"]) == (9.0, 0.5)  # of one rank, the one that waited least
    assert script.joined([answer(90.0, 5.0) | {"flops_peak": None, "reserved_gib": None}])["mfu"] is None


def test_efficiency_is_against_one_gpu_alone_at_the_same_settings(script: ModuleType) -> None:
    rows = [
        {"config": "a", "B": 1, "gpus": 1, "tokens_per_s_per_gpu": 100.0},
        {"config": "a", "B": 1, "gpus": 4, "tokens_per_s_per_gpu": 97.0},
        {"config": "a", "B": 2, "gpus": 4, "tokens_per_s_per_gpu": 97.0},
        {"config": "a", "B": 1, "gpus": 2, "failed": "rank 1: gone"},
    ]
    rows += [rows[1] | {"torch": "2.12"}, rows[1] | {"triton": "3.7"}]
    script.with_efficiency(rows)
    assert [row.get("efficiency") for row in rows] == [1.0, 0.97, None, None, None, None]
    assert script.line(rows[3] | {"strategy": "ddp"}) == "a, ddp on 2: NOT MEASURED: rank 1: gone"


def test_communication_is_hidden_where_something_else_runs(script: ModuleType) -> None:
    worker = importlib.import_module("scaling_worker")
    kernels = [
        ("ncclDevKernel_AllReduce", (0.0, 4000.0)),
        ("ncclDevKernel_AllGather", (3000.0, 6000.0)),  # overlaps the first: one stretch of 6 ms
        ("gemm", (1000.0, 2000.0)),
        ("gemm", (1500.0, 3000.0)),
        ("add", (8000.0, 9000.0)),
    ]
    assert worker.communication(kernels) == pytest.approx(
        {"communication_ms": 6.0, "communication_exposed_ms": 4.0, "communication_hidden": 1 / 3}
    )
    assert worker.communication(kernels[2:]) == {}


@pytest.mark.parametrize("config", sorted(shipped_configs()))
def test_every_configs_strategies_can_be_built(config: str, script: ModuleType) -> None:
    """With the options of the config where it is of that class: those of a base's other class are not its."""
    worker = importlib.import_module("scaling_worker")
    case = script.Case(name="x", what="", config=config)
    for name, kind in (("ddp", "TunedDDPStrategy"), ("fsdp2", "FSDP2Strategy")):
        assert type(worker.strategy_for(case, name, "full")).__name__ == kind
    assert worker.strategy_for(case, "single_device", "full") == "auto"


def test_the_configs_options_are_taken_where_it_names_the_strategy(script: ModuleType, tmp_path: Path) -> None:
    worker = importlib.import_module("scaling_worker")

    def options(config: str, name: str, gradients: str | None = None) -> dict[str, object]:
        return worker.options_for(script.Case(name="x", what="", config=config), name, gradients)

    (tmp_path / "own.yaml").write_text(OWN_OPTIONS)
    own, tuned = str(tmp_path / "own.yaml"), {"static_graph": True, "gradient_as_bucket_view": True, "gradients": "full"}
    assert options("h100_370m", "ddp").items() >= tuned.items()
    assert options("h100_370m", "ddp", "bf16").items() >= (tuned | {"gradients": "bf16"}).items()
    assert options(own, "ddp").items() >= {"static_graph": False, "bucket_cap_mb": 9, "gradients": "bf16"}.items()
    assert options(own, "ddp", "full")["gradients"] == "full"
    assert options(own, "fsdp2")["gradients"] == "full"  # the other class has options of its own
    assert options(own, "single_device", "bf16") == {}


def test_a_row_says_in_what_the_config_sums_gradients(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.yaml").write_text(OWN_OPTIONS)
    tasks = []
    monkeypatch.setattr(script, "measure", lambda task, limit: tasks.append(task) or [{"failed": "x"}])
    arguments = ["--quick", "--config", str(tmp_path / "own.yaml"), "--strategy", "ddp", "--output", str(tmp_path / "rows.json")]
    script.main(arguments)
    script.main([*arguments, "--gradients", "full"])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["gpus"], row["gradients_sent"], row["strategy_options"].get("bucket_cap_mb")) for row in rows] == [
        (2, "bf16", 9),
        (1, None, None),
        (2, "full", 9),
    ]
    assert [task["gradients"] for task in tasks] == [None, None, "full", "full"]


def test_what_the_script_gives_the_trainer_is_no_setting(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class BuiltError(Exception):
        """With the Trainer's arguments."""

    def trainer(**arguments: object) -> None:
        raise BuiltError(arguments)

    for module, own, more in (("scaling_worker", script.OWN_HERE, ("single_device", 1, None)), ("train_step_worker", script.OWN, (0.0,))):
        worker = importlib.import_module(module)
        monkeypatch.setattr(worker, "Trainer", trainer)
        case = script.Case(name="x", what="", config="cpu_tiny", seq_len=8)
        with pytest.raises(BuiltError) as built:
            worker.run(case, 1, *more)
        assert built.value.args[0].keys() - case.settings()["trainer"].keys() <= own.keys()


def test_it_measures_one_process_and_two(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    output = tmp_path / "scaling.json"
    assert script.main(["--quick", "--strategy", "fsdp2", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())
    assert [(row["strategy"], row["gpus"]) for row in rows] == [("single_device", 1), ("fsdp2", 2)]
    for row in rows:
        assert (row["config"], row["B"], row["T"], row["accumulate"], row["precision"]) == ("cpu_tiny", 2, 32, 1, "32-true")
        assert row["tokens_per_s"] == pytest.approx(row["gpus"] * row["tokens_per_s_per_gpu"])
        assert row["efficiency"] > 0
        assert row["params_m"] == rows[0]["params_m"]  # of the whole network, also in shards
        assert len(row["peak_gib_by_gpu"]) == row["gpus"]
        assert row["command"].startswith("python benchmarks/scaling.py --quick")
        assert {"torch", "gpu", "date"} <= row.keys()
    assert [row["strategy_class"] for row in rows] == ["SingleDeviceStrategy", "FSDP2Strategy"]
    assert [row["gradients_sent"] for row in rows] == [None, "full"]
    assert rows[1]["strategy_options"]["reduce_every_micro_batch"] is True
    assert rows[1]["loss"] == pytest.approx(rows[0]["loss"], rel=0.05)


@pytest.mark.faults
def test_a_rank_that_fails_ends_the_others_and_leaves_a_row(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    output = tmp_path / "scaling.json"
    arguments = ["--quick", "--gpus", "2", "--strategy", "fsdp2", "--set", "model.cuda_graph=true", "--output", str(output)]
    assert script.main(arguments) == 1
    (row,) = json.loads(output.read_text())
    assert "ValueError: model.cuda_graph: weights in shards fit no CUDA graph" in row["failed"]


WORKER = """
import json, os, sys, time
from pathlib import Path
task, rank = json.loads(sys.argv[2]), int(os.environ["RANK"])
answer, code, after = task["ranks"][rank]
time.sleep(after)
if answer is not None:
    Path(task["answers"], f"{rank}.json").write_text(json.dumps([answer]))
os._exit(code)
"""
WELL = {"B": 2, "ms_per_step": 1.0}


@pytest.mark.parametrize(
    ("ranks", "found"),
    [
        ([(WELL, 0, 0.0), (WELL, 0, 0.0)], [WELL, WELL]),
        ([(WELL, 134, 0.0), (WELL, 0, 1.0)], [WELL | {"exit_codes": [134, 0]}] * 2),  # the second comes to its end all the same
        ([(WELL, 1, 0.0), ({"failed": "OSError: x"}, 1, 0.0)], [{"failed": "rank 1: OSError: x"}]),
        ([(None, 3, 0.0), (WELL, 0, 600.0)], [{"failed": "rank 0: its process died (exit code 3)"}]),  # nobody waits for the other
        ([(None, 0, 0.0), (WELL, 0, 0.0)], [{"failed": "rank 0: its process died (exit code 0)"}]),
    ],
)
def test_a_point_is_what_its_ranks_answer_however_they_end(
    ranks: list[tuple[object, int, float]], found: list[object], script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(script, "__file__", str(tmp_path / "worker.py"))
    assert script.measure({"gpus": 2, "ranks": ranks}, 60.0) == found


def test_what_ranks_say_goes_before_who_died_and_is_said_once(script: ModuleType) -> None:
    x, y = {"failed": "OSError: x"}, {"failed": "OSError: y"}
    assert script.judged([None, x, x, y, WELL], [3, 1, 1, None, None], 9.0) == [
        {"failed": "rank 1: OSError: x; rank 3: OSError: y; rank 0: its process died (exit code 3)"}
    ]


def test_ranks_that_do_not_answer_in_time_are_ended(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(script, "__file__", str(tmp_path / "worker.py"))
    ranks = [(WELL, 0, 0.0), (WELL, 0, 600.0)]
    assert script.measure({"gpus": 2, "ranks": ranks}, 0.5) == [{"failed": "no answer within 0 s"}]


def test_a_rank_leaves_at_once_after_its_answer(script: ModuleType, tmp_path: Path) -> None:
    """What a library does when the interpreter ends, waiting for another rank or crashing, comes too late."""
    (tmp_path / "scaling_worker.py").write_text(
        "import atexit, os\natexit.register(os._exit, 9)\ndef run(*arguments): return {'B': arguments[1]}\n"
    )
    task = {"parent": os.getpid(), "case": {"name": "x", "what": ""}, "batch": 3, "strategy": "ddp", "gpus": 1, "gradients": "full"}
    call = f"import sys; sys.path[:0] = {[str(tmp_path), str(FOLDER)]!r}; import scaling; sys.exit(scaling.main())"
    command = [sys.executable, "-c", call, "--worker", json.dumps(task | {"answers": str(tmp_path)})]
    assert subprocess.run(command, env=environment(RANK="0"), check=False, timeout=100).returncode == 0
    assert json.loads((tmp_path / "0.json").read_text()) == [{"B": 3}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus: '0' is no whole number of at least 1"),
        (["--strategy", "zero"], "--strategy: invalid choice: 'zero'"),
        (["--quick", "--config", "nope"], "no config nope. Shipped ones: "),
        (["--quick", "--set", "network.modell_dim=3"], "--set: no network.modell_dim; did you mean network.model_dim?"),
        (
            ["--quick", "--set", "trainer.accumulate_grad_batches=4"],
            "--set: trainer.accumulate_grad_batches is the script's own; give --accumulate",
        ),
        (["--quick", "--set", "trainer.strategy=ddp"], "--set: trainer.strategy is the script's own; give --strategy"),
        (["--quick", "--set", "trainer.logger=true"], "--set: trainer.logger is the script's own; leave it out"),
        (["--quick", "--stepz", "3"], "unknown option --stepz; did you mean --steps?"),
        (["--config", "h100_370m"], "no CUDA device; --quick tries the script on a CPU"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(SystemExit) as stop:
        script.main(arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
