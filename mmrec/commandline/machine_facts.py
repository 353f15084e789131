"""What this machine has, read once into plain values, so that the checks are functions of them."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from packaging.requirements import Requirement
from packaging.version import Version

DISTRIBUTION = "mmrec"


class Gpu(NamedTuple):
    """One GPU that PyTorch sees; `memory` in bytes, `bf16`: whether it computes in BF16 itself."""

    name: str
    capability: tuple[int, int]
    memory: int
    bf16: bool


class Compiler(NamedTuple):
    """The C compiler that Triton would take; `gcc` is its version where it is GCC, else None."""

    description: str
    gcc: str | None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A machine. None: it has none, or it could not be read.

    Attributes:
        required: minimum versions that the installed distribution declares, by package; empty where it is not installed.
        driver: version of NVIDIA's kernel driver, whether or not PyTorch sees a GPU.
        system, architecture: as `uname` says them.
        os_id, os_version: of the Linux distribution, as in /etc/os-release.
        cores: logical cores that this process may use.
        ram: bytes, those of the control group where it has a limit.
        disk_folder, disk_free: where a run would write, and the bytes free there.
        ethernet, infiniband: Gb/s of the fastest card or port.
    """

    required: Mapping[str, str]
    torch: str
    triton: str | None
    cuda: str | None
    cudnn: str | None
    nccl: str | None
    driver: str | None
    gpus: tuple[Gpu, ...]
    system: str
    architecture: str
    os_id: str | None
    os_version: str | None
    compiler: Compiler | None
    cores: int | None
    avx2: bool | None
    ram: int | None
    disk_folder: str
    disk_free: int
    ethernet: float | None
    infiniband: float | None


def gather_facts(folder: Path, root: Path = Path("/")) -> Facts:
    """Look at this machine; a second or two, nothing is written.

    Args:
        folder: where a run would write; it need not exist.
        root: what lies before /proc, /sys and /etc.
    """
    os_id, os_version = linux_distribution(root)
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    return Facts(
        required=declared_minima(),
        torch=torch.__version__,
        triton=_installed("triton"),
        cuda=torch.version.cuda,
        cudnn=cudnn_version(torch.backends.cudnn.version()),
        nccl=_nccl_version(),
        driver=driver_version(root),
        gpus=_gpus(),
        system=platform.system(),
        architecture=platform.machine(),
        os_id=os_id,
        os_version=os_version,
        compiler=c_compiler(),
        cores=usable_cores(root),
        avx2=has_avx2(root),
        ram=memory_size(root),
        disk_folder=str(folder),
        disk_free=shutil.disk_usage(existing).free,
        ethernet=ethernet_speed(root),
        infiniband=infiniband_rate(root),
    )


# ---- packages


def declared_minima() -> dict[str, str]:
    """Lower bounds among the installed distribution's dependencies on this platform; empty where it is not installed as one."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return {}
    needs = [Requirement(line) for line in lines]
    here = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    bounds = {need.name: [part.version for part in need.specifier if part.operator == ">="] for need in here}
    return {name: max(versions, key=Version) for name, versions in bounds.items() if versions}


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cudnn_version(number: int | None) -> str | None:
    """91002 as 9.10.2, and 8902 as 8.9.2: the thousands became ten thousands with cuDNN 9."""
    if number is None:
        return None
    base = 10000 if number >= 90000 else 1000
    return f"{number // base}.{number % base // 100}.{number % 100}"


def _nccl_version() -> str | None:
    if not torch.distributed.is_nccl_available():
        return None
    return ".".join(str(part) for part in torch.cuda.nccl.version() if isinstance(part, int))


# ---- the GPU


def driver_version(root: Path) -> str | None:
    """Version of NVIDIA's driver, from the kernel module; from `nvidia-smi` where /proc does not show it."""
    version = re.search(r"^NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", _text(root / "proc/driver/nvidia/version"), re.MULTILINE)
    if version:
        return version[1]
    listed = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").strip().splitlines()
    return listed[0] if listed and re.fullmatch(r"[\d.]+", listed[0]) else None


def _gpus() -> tuple[Gpu, ...]:
    if not torch.cuda.is_available():
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            properties = torch.cuda.get_device_properties(index)
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            found.append(Gpu(properties.name, (properties.major, properties.minor), properties.total_memory, bf16))
    return tuple(found)


# ---- the machine


def linux_distribution(root: Path) -> tuple[str | None, str | None]:
    """ID and VERSION_ID of /etc/os-release."""
    pairs = (line.partition("=") for line in _text(root / "etc/os-release").splitlines())
    values = {key: value.strip().strip("\"'") for key, _, value in pairs}
    return values.get("ID"), values.get("VERSION_ID")


def c_compiler() -> Compiler | None:
    """The compiler that Triton takes for its launchers: $CC, else gcc, else clang (its runtime/build.py)."""
    path = shutil.which(os.environ.get("CC") or "gcc") or (None if os.environ.get("CC") else shutil.which("clang"))
    about = _output(path, "--version") if path else ""
    if path is None or not about:
        return None
    is_gcc = "Free Software Foundation" in about
    return Compiler(about.splitlines()[0], _output(path, "-dumpversion").strip() or None if is_gcc else None)


def usable_cores(root: Path) -> int | None:
    """Logical cores that this process may run on: a batch system gives some of them."""
    allowed = re.search(r"^Cpus_allowed_list:\s*(\S+)", _text(root / "proc/self/status"), re.MULTILINE)
    if allowed:
        spans = [[int(end) for end in span.split("-")] for span in allowed[1].split(",")]
        return sum(span[-1] - span[0] + 1 for span in spans)
    return len(re.findall(r"^processor\s*:", _text(root / "proc/cpuinfo"), re.MULTILINE)) or None


def has_avx2(root: Path) -> bool | None:
    """Whether the CPU lists AVX2 among its flags; None where it lists none at all."""
    flags = re.search(r"^flags\s*:(.*)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    return "avx2" in flags[1].split() if flags else None


def memory_size(root: Path) -> int | None:
    """Bytes of memory, or of the control group's limit where that is less."""
    total = re.search(r"^MemTotal:\s*(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    limit = _text(root / "sys/fs/cgroup/memory.max").strip()
    sizes = ([int(total[1]) * 1024] if total else []) + ([int(limit)] if limit.isdigit() else [])
    return min(sizes, default=None)


def ethernet_speed(root: Path) -> float | None:
    """Gb/s of the fastest network card; loopback and virtual interfaces have no device, and many virtual machines report no speed."""
    speeds = [_text(card / "speed").strip() for card in (root / "sys/class/net").glob("*") if (card / "device").exists()]
    return max((int(speed) / 1000 for speed in speeds if speed.isdigit()), default=None)


def infiniband_rate(root: Path) -> float | None:
    """Gb/s of the fastest active InfiniBand port."""
    ports = [port for port in (root / "sys/class/infiniband").glob("*/ports/*") if "ACTIVE" in _text(port / "state")]
    rates = [re.match(r"(\d+(?:\.\d+)?) Gb/sec", _text(port / "rate")) for port in ports]
    return max((float(rate[1]) for rate in rates if rate), default=None)


def _text(path: Path) -> str:
    """Content of a file of the kernel's; empty where there is none or it refuses, as it does for the speed of a card that is down."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _output(*command: str) -> str:
    """What a command prints; empty where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
