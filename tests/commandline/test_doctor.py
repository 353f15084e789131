"""`doctor`: each check from facts alone, the facts from a laid-out tree, and the command on the machine of the tests."""

import json
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml

from mmrec.commandline import command_doctor, machine_checks, machine_facts, machine_needs
from mmrec.commandline.configs import config_layers, merge
from mmrec.commandline.errors import BadInputError
from mmrec.commandline.machine_checks import Check, run_checks
from mmrec.commandline.machine_facts import Compiler, Facts, Gpu
from mmrec.commandline.machine_needs import Plan

ROOT = Path(__file__).parents[2]
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 85_000_000_000, True)
V100 = Gpu("Tesla V100", (7, 0), 34_000_000_000, False)
GOOD = Facts(
    required={"torch": "2.11", "triton": "3.6"},
    torch="2.11.0+cu130",
    triton="3.6.0",
    cuda="13.0",
    cudnn="9.19.0",
    nccl="2.28.9",
    driver="580.95.05",
    gpus=(H100, H100),
    system="Linux",
    architecture="x86_64",
    os_id="ubuntu",
    os_version="22.04",
    compiler=Compiler("gcc (Ubuntu 11.4.0) 11.4.0", "11"),
    cores=64,
    avx2=True,
    ram=256_000_000_000,
    disk_folder="runs",
    disk_free=2_000_000_000_000,
    ethernet=25.0,
    infiniband=400.0,
)
BARE = replace(GOOD, torch="2.13.0+cpu", cuda=None, cudnn=None, nccl=None, driver=None, gpus=(), infiniband=None)
NEEDS_GPU = Plan(config="big", accelerator="gpu", parameters=7_400_000_000, memory=63_000_000_000, checkpoint=44_000_000_000)
ON_CPU = Plan(config="small", accelerator="cpu", parameters=10**6, memory=10**8, checkpoint=10**7)
GPU_CHECKS = {"CUDA", "cuDNN", "NVIDIA driver", "GPU", "compute capability", "native BF16", "GPU memory"}
NO_CONFIG = Plan()
TWO_NODES = Plan(nodes=2)


def by_name(facts: Facts, plan: Plan = NO_CONFIG) -> dict[str, Check]:
    """All checks; the disk's under `disk`, whatever the folder."""
    return {check.name.partition(",")[0]: check for check in run_checks(facts, plan)}


def with_status(facts: Facts, plan: Plan, status: str) -> set[str]:
    return {name for name, check in by_name(facts, plan).items() if check.status == status}


# ---- checks


def test_a_good_machine_passes_every_check() -> None:
    assert {check.status for check in run_checks(GOOD, replace(NEEDS_GPU, nodes=2))} == {"ok"}


@pytest.mark.parametrize(
    ("name", "changes", "plan", "status"),
    [
        ("PyTorch", {"torch": "2.10.1+cu128"}, NO_CONFIG, "failed"),
        ("PyTorch", {"torch": "2.11.0.dev20260101+cu130"}, NO_CONFIG, "ok"),
        ("PyTorch", {"required": {}}, NO_CONFIG, "unknown"),
        ("Triton", {"triton": "3.5.1"}, NO_CONFIG, "failed"),
        ("Triton", {"triton": None}, NO_CONFIG, "failed"),
        ("CUDA", {"cuda": "12.4"}, NO_CONFIG, "failed"),
        ("CUDA", {"cuda": "12.8"}, NO_CONFIG, "below recommended"),
        ("cuDNN", {"cudnn": "8.9.2"}, NO_CONFIG, "failed"),
        ("cuDNN", {"cudnn": "9.1.0"}, NO_CONFIG, "below recommended"),
        ("cuDNN", {"cudnn": "9.19.0"}, NO_CONFIG, "ok"),
        ("NCCL", {"nccl": "2.20.5"}, NO_CONFIG, "failed"),
        ("NCCL", {"nccl": "2.27.5"}, NO_CONFIG, "below recommended"),
        ("NCCL", {"gpus": (H100,), "nccl": "2.20.5"}, NO_CONFIG, "not applicable"),
        ("NCCL", {"gpus": (H100,), "nccl": "2.20.5"}, TWO_NODES, "failed"),
        ("NCCL", {"nccl": None}, NO_CONFIG, "failed"),
        ("NVIDIA driver", {"driver": "575.57.08"}, NO_CONFIG, "failed"),  # CUDA 13 needs 580
        ("NVIDIA driver", {"driver": "575.57.08", "cuda": "12.6"}, NO_CONFIG, "ok"),
        ("NVIDIA driver", {"driver": "550.54.15", "cuda": "12.6"}, NO_CONFIG, "below recommended"),
        ("NVIDIA driver", {"driver": "520.61.05", "cuda": "12.6"}, NO_CONFIG, "failed"),
        ("NVIDIA driver", {"driver": None}, NO_CONFIG, "unknown"),
        ("NVIDIA driver", {"cuda": "14.0"}, NO_CONFIG, "unknown"),
        ("GPU", {"gpus": ()}, NO_CONFIG, "failed"),  # a driver is loaded
        ("compute capability", {"gpus": (H100, V100)}, NO_CONFIG, "failed"),
        ("compute capability", {"gpus": (H100._replace(capability=(8, 6)),)}, NO_CONFIG, "below recommended"),
        ("compute capability", {"gpus": (H100._replace(capability=(12, 0)),)}, NO_CONFIG, "ok"),
        ("native BF16", {"gpus": (H100, V100)}, NO_CONFIG, "failed"),
        ("GPU memory", {}, NO_CONFIG, "unknown"),
        ("GPU memory", {"gpus": (H100, V100)}, NEEDS_GPU, "failed"),
        ("GPU memory", {"gpus": (H100._replace(memory=70_000_000_000),)}, NEEDS_GPU, "below recommended"),
        ("GPU memory", {"gpus": (V100,)}, replace(NEEDS_GPU, parameters=10**9, memory=30_000_000_000), "below recommended"),
        ("GPU memory", {"gpus": (V100,)}, replace(NEEDS_GPU, parameters=10**9, memory=25_000_000_000), "ok"),
        ("GPU memory", {"gpus": (V100,)}, replace(NEEDS_GPU, memory=25_000_000_000), "failed"),  # 40 GB for 7B, whatever the estimate
        ("CPU cores", {"cores": 7}, NO_CONFIG, "failed"),
        ("CPU cores", {"cores": 8}, NO_CONFIG, "below recommended"),
        ("CPU cores", {"cores": None}, NO_CONFIG, "unknown"),
        ("CPU cores", {"cores": 2}, ON_CPU, "below recommended"),
        ("RAM", {"ram": 63_000_000_000}, NO_CONFIG, "failed"),
        ("RAM", {"ram": 64_000_000_000}, NO_CONFIG, "below recommended"),
        ("RAM", {"ram": None}, NO_CONFIG, "unknown"),
        ("RAM", {"ram": 10**9}, ON_CPU, "below recommended"),
        ("AVX2", {"avx2": False}, NO_CONFIG, "below recommended"),
        ("AVX2", {"avx2": None}, NO_CONFIG, "unknown"),
        ("AVX2", {"avx2": None, "architecture": "aarch64"}, NO_CONFIG, "not applicable"),
        ("disk", {}, NO_CONFIG, "unknown"),
        ("disk", {"disk_free": 175_000_000_000}, NEEDS_GPU, "failed"),
        ("disk", {"disk_free": 177_000_000_000}, NEEDS_GPU, "below recommended"),
        ("disk", {"disk_free": 10**8}, ON_CPU, "ok"),
        ("C compiler", {"compiler": None}, NO_CONFIG, "failed"),
        ("C compiler", {"compiler": None}, ON_CPU, "not applicable"),
        ("C compiler", {"compiler": Compiler("gcc 8.5.0", "8")}, NO_CONFIG, "below recommended"),
        ("C compiler", {"compiler": Compiler("clang version 14.0.0", None)}, NO_CONFIG, "ok"),
        ("operating system", {"system": "Darwin"}, NO_CONFIG, "failed"),
        ("operating system", {"os_version": "18.04"}, NO_CONFIG, "below recommended"),
        ("operating system", {"os_id": "rocky", "os_version": "9.4"}, NO_CONFIG, "ok"),
        ("operating system", {"os_id": "arch", "os_version": None}, NO_CONFIG, "unknown"),
        ("Ethernet", {"ethernet": 1.0, "infiniband": None}, NO_CONFIG, "below recommended"),
        ("Ethernet", {"ethernet": 1.0, "infiniband": None}, TWO_NODES, "failed"),
        ("Ethernet", {"ethernet": 1.0}, TWO_NODES, "below recommended"),  # over InfiniBand instead
        ("Ethernet", {"ethernet": None}, NO_CONFIG, "unknown"),
        ("Ethernet", {"ethernet": None}, TWO_NODES, "unknown"),
        ("InfiniBand", {"infiniband": None}, NO_CONFIG, "not applicable"),
        ("InfiniBand", {"infiniband": 100.0}, TWO_NODES, "below recommended"),
        ("InfiniBand", {"infiniband": 200.0}, TWO_NODES, "ok"),
    ],
)
def test_a_check_says_what_the_facts_are_worth(name: str, changes: dict[str, object], plan: Plan, status: str) -> None:
    check = by_name(replace(GOOD, **changes), plan)[name]
    assert check.status == status, check
    assert check.note, check


def test_without_a_gpu_only_a_config_that_wants_one_fails() -> None:
    assert with_status(BARE, NO_CONFIG, "failed") == set()
    assert with_status(BARE, ON_CPU, "failed") == set()
    assert with_status(BARE, NO_CONFIG, "not applicable") >= GPU_CHECKS
    checks = by_name(BARE, NEEDS_GPU)
    assert with_status(BARE, NEEDS_GPU, "failed") == {"GPU"}  # one cause, one failure
    assert (
        checks["GPU"].note
        == "big trains on a GPU and there is none here: use a machine with one, or a config that fits a CPU, cpu_tiny.yaml"
    )
    assert with_status(BARE, NEEDS_GPU, "unknown") == GPU_CHECKS - {"GPU"}
    assert {checks[name].note for name in GPU_CHECKS - {"GPU"}} == {"no GPU is seen: see the check GPU"}
    assert with_status(GOOD, ON_CPU, "not applicable") >= GPU_CHECKS


def test_a_gpu_that_pytorch_does_not_see_fails_with_the_reason() -> None:
    cpu_build = by_name(replace(BARE, driver="580.95.05"))["GPU"]
    assert cpu_build.status == "failed"
    assert cpu_build.note.startswith("PyTorch 2.13.0+cpu was built without CUDA")
    assert "CUDA_VISIBLE_DEVICES" in by_name(replace(GOOD, gpus=()))["GPU"].note


def test_the_notes_name_the_founding_documents_own_numbers() -> None:
    checks = by_name(GOOD, NEEDS_GPU)
    for name, asked in {
        "PyTorch": "2.0",
        "Triton": "2.0",
        "CUDA": "11.8",
        "cuDNN": "8.6",
        "NCCL": "2.15",
        "compute capability": "7.0",
    }.items():
        assert f"the founding document: {asked}" in checks[name].note
    assert "the founding document: 520.61.05" in checks["NVIDIA driver"].note
    assert (checks["GPU memory"].minimum, checks["GPU memory"].recommended) == ("63.0 GB", "80.0 GB")


@pytest.mark.parametrize(
    ("version", "capability", "status", "warned"),
    [
        ("3.6.0", (9, 0), "ok", True),
        ("3.5.1", (9, 0), "below recommended", True),
        ("3.7.0", (9, 0), "below recommended", True),
        ("3.7.1", (9, 0), "below recommended", False),
        ("3.6.0", (8, 0), "below recommended", False),
        ("3.3.1", (9, 0), "below recommended", False),
    ],
)
def test_gradients_count_as_verified_only_where_they_were(version: str, capability: tuple[int, int], status: str, warned: bool) -> None:
    check = by_name(replace(GOOD, triton=version, gpus=(H100._replace(capability=capability),)))["verified gradients"]
    assert check.status == status
    assert ("gave others wrong gradients" in check.note) is warned
    assert "pytest -m gpu" in check.note


def test_what_no_file_has_rows_of_is_said_to_be_compared_by_tests() -> None:
    check = by_name(replace(GOOD, triton="3.6.0", gpus=(H100,)))["verified gradients"]
    assert check.status == "ok"
    assert "ops_h200.json; those of gated_scan_from_logits, addressed_memory_bwd_out by `pytest -m gpu`" in check.note


@pytest.mark.parametrize(("combination", "file"), machine_needs.VERIFIED.items())
def test_the_files_that_verify_gradients_say_so(combination: tuple[str, str], file: str) -> None:
    rows = [row for row in json.loads((ROOT / file).read_text(encoding="utf-8")) if "parity" in row]
    assert rows
    assert {row["parity"] for row in rows} == {"ok"}
    assert {".".join(row["triton"].split(".")[:2]) for row in rows} == {combination[1]}
    names = {"sm90": ("H100", "H200", "GH200")}[combination[0]]
    assert all(any(name in row["gpu"] for name in names) for row in rows)


# ---- facts


def lay_out(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_facts_are_read_from_the_kernels_files(tmp_path: Path) -> None:
    root = lay_out(
        tmp_path,
        {
            "etc/os-release": 'NAME="Rocky Linux"\nID="rocky"\nVERSION_ID="9.4"\n',
            "proc/cpuinfo": "processor\t: 0\nflags\t\t: sse4_2 avx avx2\n\nprocessor\t: 1\nflags\t\t: sse4_2 avx avx2\n",
            "proc/self/status": "Name:\tpython\nCpus_allowed:\tf1\nCpus_allowed_list:\t0,4-7\n",
            "proc/meminfo": "MemTotal:       131072000 kB\nMemFree:  1 kB\n",
            "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build\n",
            "sys/class/net/lo/speed": "",
            "sys/class/net/veth0/speed": "100000\n",
            "sys/class/net/eth0/speed": "25000\n",
            "sys/class/net/eth0/device/vendor": "0x15b3",
            "sys/class/net/eth1/speed": "-1\n",
            "sys/class/net/eth1/device/vendor": "0x15b3",
            "sys/class/infiniband/mlx5_0/ports/1/rate": "200 Gb/sec (4X HDR)\n",
            "sys/class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE\n",
            "sys/class/infiniband/mlx5_1/ports/1/rate": "400 Gb/sec (4X NDR)\n",
            "sys/class/infiniband/mlx5_1/ports/1/state": "1: DOWN\n",
        },
    )
    facts = machine_facts.gather_facts(tmp_path / "runs" / "not" / "yet", root)
    assert (facts.os_id, facts.os_version) == ("rocky", "9.4")
    assert (facts.cores, facts.avx2, facts.ram) == (5, True, 131072000 * 1024)
    assert facts.driver == "550.54.15"
    assert (facts.ethernet, facts.infiniband) == (25.0, 200.0)
    assert facts.disk_free > 0
    lay_out(root, {"sys/fs/cgroup/memory.max": "64000000000\n"})
    (root / "proc/self/status").unlink()
    assert machine_facts.memory_size(root) == 64_000_000_000
    assert machine_facts.usable_cores(root) == 2
    lay_out(
        root, {"proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"}
    )
    assert machine_facts.driver_version(root) == "535.104.05"


def test_an_empty_tree_is_a_machine_of_which_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    facts = machine_facts.gather_facts(tmp_path, tmp_path)
    read = (facts.os_id, facts.cores, facts.avx2, facts.ram, facts.driver, facts.ethernet, facts.infiniband, facts.compiler)
    assert read == (None,) * len(read)
    assert {check.status for check in run_checks(replace(facts, gpus=()), NO_CONFIG)} <= {"ok", "unknown", "not applicable"}


def test_the_driver_and_the_compiler_are_asked_for_where_files_do_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, script in {
        "nvidia-smi": "echo 570.86.15; echo 570.86.15",
        "clang": "echo Debian clang version 14.0.6",
        "mycc": 'if [ "$1" = -dumpversion ]; then echo 8; else echo "mycc 8.5.0"; echo "Copyright Free Software Foundation, Inc."; fi',
        "broken": "exit 1",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert machine_facts.driver_version(tmp_path) == "570.86.15"
    assert machine_facts.c_compiler() == Compiler("Debian clang version 14.0.6", None)
    monkeypatch.setenv("CC", "mycc")
    assert machine_facts.c_compiler() == Compiler("mycc 8.5.0", "8")
    for missing in ("broken", "nowhere"):  # Triton takes $CC and nothing else
        monkeypatch.setenv("CC", missing)
        assert machine_facts.c_compiler() is None


def test_versions_are_put_together_as_nvidia_writes_them() -> None:
    assert [machine_facts.cudnn_version(number) for number in (8902, 91002, 91900, None)] == ["8.9.2", "9.10.2", "9.19.0", None]


def test_minima_of_packages_are_those_of_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "torch>=2.12,<3",
        "triton>=3.8; platform_system == 'Linux'",
        "other>=1; platform_system == 'Nowhere'",
        "extra>=9; extra == 'dev'",
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    assert machine_facts.declared_minima().get("torch") == "2.12"
    assert not {"other", "extra"} & set(machine_facts.declared_minima())

    def missing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert machine_facts.declared_minima() == {}
    assert "pip install -e ." in machine_checks.pytorch(replace(GOOD, required={}), NO_CONFIG).note


# ---- the command


def test_a_config_says_what_it_needs() -> None:
    large = command_doctor.plan_of("h100_7b.yaml", merge(config_layers("h100_7b.yaml")))
    assert (large.config, large.accelerator, large.nodes) == ("h100_7b", "gpu", 1)
    assert large.checkpoint == pytest.approx(4 * large.parameters, rel=0.01)  # weights of bf16, and two moments of 8 bits with scales
    assert large.memory > 6 * large.parameters
    small = command_doctor.plan_of("cpu_tiny", merge(config_layers("cpu_tiny")), nodes=3)
    assert (small.accelerator, small.nodes) == ("cpu", 3)
    assert small.checkpoint == 12 * small.parameters
    mine = {"model": {"network": {"model_dim": 64}}, "trainer": {"num_nodes": 4}}
    assert command_doctor.plan_of("x", mine).nodes == 4
    # Two newest, the best, and the one that is being written.
    assert [command_doctor.plan_of("x", {**mine, "checkpoint_keep": keep}).checkpoints for keep in (None, 0, 1, 2, 5)] == [4, 3, 3, 4, 7]
    assert command_doctor.plan_of("x", {**mine, "checkpoint_best": False}).checkpoints == 3
    with pytest.raises(BadInputError, match=r"^config ablation/dpg gives no model\.network\.model_dim or num_layers: it is an overlay"):
        command_doctor.plan_of("ablation/dpg", merge(config_layers("ablation/dpg")))


def test_doctor_on_this_machine_exits_by_its_table(cli) -> None:
    printed = cli("doctor", "--json")
    answer = json.loads(printed.out)
    failed = [check for check in answer["checks"] if check["status"] == "failed"]
    assert answer["failed"] == len(failed)
    assert printed.code == bool(failed)
    assert [check["found"] for check in answer["checks"] if check["name"] == "PyTorch"] == [torch.__version__]
    table = cli("doctor")
    assert table.code == printed.code
    assert all(check["name"] in table.out for check in answer["checks"])
    assert not table.err


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch):
    """Lets the command find the facts given."""
    return lambda facts: monkeypatch.setattr(command_doctor, "gather_facts", lambda folder: replace(facts, disk_folder=str(folder)))


def test_doctor_fails_where_a_config_wants_a_gpu_that_is_not_there(cli, on) -> None:
    on(BARE)
    assert cli("doctor").code == 0
    assert cli("doctor", "--config", "cpu_tiny").code == 0
    printed = cli("doctor", "--config", "h100_7b.yaml")
    assert printed.code == 1
    (line,) = [line for line in printed.out.splitlines() if line.startswith("failed ")]
    assert line.startswith("failed GPU: h100_7b trains on a GPU")
    assert line.endswith("use a machine with one, or a config that fits a CPU, cpu_tiny.yaml")
    assert json.loads(cli("doctor", "--config", "h100_7b.yaml", "--json").out)["failed"] == 1
    on(GOOD)
    assert cli("doctor", "--config", "h100_7b").code == 0


def test_doctor_counts_machines_and_looks_at_the_configs_own_disk(cli, on) -> None:
    on(replace(GOOD, ethernet=1.0, infiniband=None))
    assert cli("doctor").code == 0
    printed = cli("doctor", "--nodes", "2")
    assert printed.code == 1
    assert "failed Ethernet: train on one machine or get a faster network" in printed.out
    Path("mine.yaml").write_text(yaml.safe_dump({"base": "cpu_tiny", "trainer": {"default_root_dir": "elsewhere/run"}}))
    assert "disk, elsewhere/run" in cli("doctor", "--config", "mine.yaml").out
    assert "disk, runs/cpu_tiny" in cli("doctor", "--config", "cpu_tiny").out


def test_doctor_refuses_bad_input_in_one_line(cli) -> None:
    assert cli("doctor", "--config", "h100_7").error.startswith("no config h100_7; did you mean h100_7b?")
    assert cli("doctor", "--nodes", "0").code == 2
    assert cli("doctor", "--jso").error.startswith("unknown key jso; did you mean json?")
    for content in ("trainer: 3", "model: {network: {model_dimm: 3}}", "data: {init_args: {batch_size: many}}"):
        Path("bad.yaml").write_text(f"base: cpu_tiny\n{content}")
        assert cli("doctor", "--config", "bad.yaml").error.startswith("config bad.yaml: ")


def test_a_narrow_terminal_has_the_notes_below_the_table(on, monkeypatch: pytest.MonkeyPatch, cli) -> None:
    on(replace(GOOD, ethernet=None))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    printed = cli("doctor").out
    assert any(line.endswith("Ethernet: no card reports its speed; one machine needs none") for line in printed.splitlines())
    assert "declared in pyproject.toml" not in printed  # notes on what is well are left out


def test_the_help_lists_doctor(cli) -> None:
    assert "\n    doctor  " in cli("--help").out
    assert "--nodes" in cli("doctor", "--help").out
