"""The checks of `doctor`: each a function of a machine's facts and of what a run asks for, without looking at anything itself."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from packaging.version import Version

from mmrec.commandline import machine_needs as needs
from mmrec.commandline.machine_facts import Facts
from mmrec.commandline.machine_needs import Bound, Plan

Status = Literal["ok", "below recommended", "failed", "unknown", "not applicable"]
_GB = 1e9
_NO_GPU_SEEN = "no GPU is seen: see the check GPU"


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        name, found: what was looked at, and what is there.
        minimum, recommended: as text with units, empty where there is none.
        status: "failed" below the minimum.
        note: why these bounds; for a failure the remedy first.
    """

    name: str
    found: str
    minimum: str
    recommended: str
    status: Status
    note: str


def run_checks(facts: Facts, plan: Plan) -> list[Check]:
    """All checks, in the order of the table."""
    return [check(facts, plan) for check in CHECKS]


def trains_on_gpu(facts: Facts, plan: Plan) -> bool:
    """Whether the run will want a GPU: by its config where that says so, else by whether the machine has one."""
    if plan.accelerator in ("gpu", "cuda"):
        return True
    return plan.accelerator != "cpu" and (bool(facts.gpus) or facts.driver is not None)


# ---- software


def pytorch(facts: Facts, plan: Plan) -> Check:
    """PyTorch against the version that pyproject.toml declares."""
    return _declared("PyTorch", "torch", facts.torch, needs.PYTORCH, facts)


def triton(facts: Facts, plan: Plan) -> Check:
    """Triton against the version that pyproject.toml declares; no kernel runs without a GPU."""
    return _lenient_without_gpu(_declared("Triton", "triton", facts.triton, needs.TRITON, facts), needs.TRITON, facts, plan)


def cuda(facts: Facts, plan: Plan) -> Check:
    """The CUDA that PyTorch was built for."""
    return _on_gpu("CUDA", facts.cuda, needs.CUDA, facts, plan)


def cudnn(facts: Facts, plan: Plan) -> Check:
    """The cuDNN that PyTorch brings."""
    return _on_gpu("cuDNN", facts.cudnn, needs.CUDNN, facts, plan)


def nccl(facts: Facts, plan: Plan) -> Check:
    """The NCCL that PyTorch brings, where several GPUs train together."""
    if trains_on_gpu(facts, plan) and len(facts.gpus) <= 1 and plan.nodes == 1:
        return Check("NCCL", facts.nccl or "none", *_limits(needs.NCCL), "not applicable", "one GPU exchanges nothing")
    return _on_gpu("NCCL", facts.nccl, needs.NCCL, facts, plan)


def driver(facts: Facts, plan: Plan) -> Check:
    """NVIDIA's driver against what PyTorch's CUDA needs."""
    name, oldest = "NVIDIA driver", min(needs.DRIVERS)
    bound = needs.DRIVERS.get(max(Version(facts.cuda).major, oldest) if facts.cuda else oldest)
    if bound is None:
        return Check(name, facts.driver or "none", "", "", "unknown", f"what CUDA {facts.cuda} needs is not in our table")
    if trains_on_gpu(facts, plan) and facts.gpus and facts.driver is None:
        note = "the GPU answers, but neither /proc/driver/nvidia nor nvidia-smi says its driver's version"
        return Check(name, "not known", *_limits(bound), "unknown", note)
    return _on_gpu(name, facts.driver, bound, facts, plan)


def gradients_verified(facts: Facts, plan: Plan) -> Check:
    """Whether our kernels' gradients were compared with float64 on this architecture with this Triton."""
    name = "verified gradients"
    if not trains_on_gpu(facts, plan) or not facts.gpus or facts.triton is None:
        return Check(name, "none", "", "", "not applicable", "no kernel runs without a GPU and Triton")
    version = Version(facts.triton)
    minor = f"{version.major}.{version.minor}"
    architectures = sorted({"sm{}{}".format(*device.capability) for device in facts.gpus})
    files = [needs.VERIFIED.get((architecture, minor)) for architecture in architectures]
    first, mended = (Version(end) for end in needs.MISCOMPILED_ON_HOPPER)
    known_bad = first <= version < mended and any(device.capability[0] == 9 for device in facts.gpus)
    warning = f"Triton {first} to below {mended} gave others wrong gradients on Hopper; " if known_bad else ""
    found = f"{', '.join(architectures)}, Triton {facts.triton}"
    if all(files):
        note = f"{warning}ours agree with float64 there: {', '.join(sorted({file for file in files if file}))}"
        note += f"; those of {', '.join(needs.BY_TESTS)} by `pytest -m gpu` (docs/log.md)"
        return Check(name, found, "", "", "ok", note)
    note = f"{warning}ours were not compared with float64 there: run `make bench`, or `pytest -m gpu`"
    return Check(name, found, "", "", "below recommended", note)


def compiler(facts: Facts, plan: Plan) -> Check:
    """A C compiler, without which Triton launches nothing."""
    name, limits = "C compiler", (f"GCC {needs.GCC.minimum}, or any other", "")
    if facts.compiler is None:
        if trains_on_gpu(facts, plan):
            remedy = "install gcc, or name a compiler in $CC: Triton compiles a small launcher at its first run"
            return Check(name, "none", *limits, "failed", remedy)
        return Check(name, "none", *limits, "not applicable", "only Triton needs one, and no kernel runs without a GPU")
    old = facts.compiler.gcc is not None and not _reaches(facts.compiler.gcc, needs.GCC.minimum)
    return Check(name, facts.compiler.description, *limits, "below recommended" if old else "ok", needs.GCC.reason)


def operating_system(facts: Facts, plan: Plan) -> Check:
    """Linux, and of which release."""
    name, limits = "operating system", ("Linux", needs.DISTRIBUTIONS_IN_WORDS)
    if facts.system != "Linux":
        return Check(name, facts.system, *limits, "failed", "use Linux: Triton is published for no other system")
    found = " ".join(part for part in (facts.os_id, facts.os_version) if part) or "Linux"
    oldest = needs.DISTRIBUTIONS.get(facts.os_id or "")
    if oldest is None or facts.os_version is None:
        return Check(name, found, *limits, "unknown", "the founding document names no release of it; PyTorch's wheels need glibc 2.28")
    status: Status = "ok" if _reaches(facts.os_version, oldest) else "below recommended"
    return Check(name, found, *limits, status, "the founding document's; PyTorch's wheels need glibc 2.28")


# ---- the GPU


def gpu(facts: Facts, plan: Plan) -> Check:
    """Whether PyTorch sees a GPU where one is wanted."""
    names = [device.name for device in facts.gpus]
    found = ", ".join(f"{names.count(device)} × {device}" for device in dict.fromkeys(names)) or "none"
    if not trains_on_gpu(facts, plan):
        return Check("GPU", found, "", "", "not applicable", _without_gpu(plan))
    return Check("GPU", found, "1", "", *(("ok", "") if names else ("failed", _missing_gpu(facts, plan))))


def compute_capability(facts: Facts, plan: Plan) -> Check:
    """The GPU's generation; of several GPUs the oldest."""
    oldest = min((device.capability for device in facts.gpus), default=None)
    return _on_gpu("compute capability", "{}.{}".format(*oldest) if oldest else None, needs.CAPABILITY, facts, plan)


def native_bf16(facts: Facts, plan: Plan) -> Check:
    """Whether every GPU computes in BF16 itself."""
    name = "native BF16"
    if not trains_on_gpu(facts, plan):
        return Check(name, "none", "yes", "yes", "not applicable", _without_gpu(plan))
    if not facts.gpus:
        return Check(name, "none", "yes", "yes", "unknown", _NO_GPU_SEEN)
    if all(device.bf16 for device in facts.gpus):
        return Check(name, "yes", "yes", "yes", "ok", "the GPU configs train in BF16")
    return Check(name, "no", "yes", "yes", "failed", f"{needs.CAPABILITY.remedy}: the GPU configs train in BF16")


def gpu_memory(facts: Facts, plan: Plan) -> Check:
    """The smallest GPU's memory against the config's estimate, and for a 7B network against the founding document too."""
    name, smallest = "GPU memory", min((device.memory for device in facts.gpus), default=None)
    found = "none" if smallest is None else f"{smallest / _GB:.1f} GB"
    if not trains_on_gpu(facts, plan):
        return Check(name, found, "", "", "not applicable", _without_gpu(plan))
    if plan.memory is None:
        if smallest is None:
            return Check(name, found, "", "", "unknown", _NO_GPU_SEEN)
        return Check(name, found, "", "", "unknown", "--config NAME says how much a run needs")
    need, better = plan.memory / _GB, needs.ALLOCATOR * plan.memory / _GB
    reason = f"{plan.config}: weights, gradients, optimiser, activations as `configs` estimates them; the allocator adds up to 15 %"
    low, high = needs.BILLIONS_OF_7B
    if low <= plan.parameters / 1e9 <= high:
        document = needs.GPU_MEMORY_7B
        need, better = max(need, float(document.minimum)), max(better, float(document.recommended))
        reason += f"; the founding document: {document.minimum} GB, {document.recommended} better, for 7B"
    bound = Bound(f"{need:.1f}", f"{better:.1f}", reason, "lower data.batch_size, or train on a GPU with more memory", "GB")
    return _on_gpu(name, None if smallest is None else smallest / _GB, bound, facts, plan)


# ---- the rest of the machine


def cores(facts: Facts, plan: Plan) -> Check:
    """Cores that this process may use."""
    return _lenient_without_gpu(_graded("CPU cores", facts.cores, needs.CORES), needs.CORES, facts, plan)


def avx2(facts: Facts, plan: Plan) -> Check:
    """AVX2, for what PyTorch does on the CPU."""
    name, reason = "AVX2", "PyTorch's kernels for CPUs are written for it; the founding document's"
    if facts.architecture not in ("x86_64", "AMD64"):
        return Check(name, facts.architecture, "", "yes", "not applicable", "the founding document asks for x86-64, nothing here does")
    if facts.avx2 is None:
        return Check(name, "not known", "", "yes", "unknown", reason)
    return Check(name, "yes" if facts.avx2 else "no", "", "yes", "ok" if facts.avx2 else "below recommended", reason)


def ram(facts: Facts, plan: Plan) -> Check:
    """The machine's memory."""
    size = None if facts.ram is None else facts.ram / _GB
    return _lenient_without_gpu(_graded("RAM", size, needs.RAM), needs.RAM, facts, plan)


def disk(facts: Facts, plan: Plan) -> Check:
    """Free space where the run will write its checkpoints."""
    name, free = f"disk, {facts.disk_folder}", facts.disk_free / _GB
    if plan.checkpoint is None:
        return Check(name, f"{free:.1f} GB", "", "", "unknown", "--config NAME says how large its checkpoints are")
    size = plan.checkpoint / _GB
    many = max(needs.CHECKPOINTS_RECOMMENDED, 2 * plan.checkpoints)
    reason = (
        f"{plan.checkpoints} checkpoints of {size:.3g} GB, weights and two AdamW moments: {max(plan.newest_kept, 1)} newest"
        f"{' and the best' if plan.best_kept else ''} stay while the next is written; {many} leave room for earlier runs"
    )
    minimum, recommended = (f"{count * size:.3g}" for count in (plan.checkpoints, many))
    remedy = "free some space, or set trainer.default_root_dir to a larger disk"
    return _graded(name, free, Bound(minimum, recommended, reason, remedy, "GB"))


def ethernet(facts: Facts, plan: Plan) -> Check:
    """The network's speed; a failure only where several machines train together and have no InfiniBand either."""
    check = _graded("Ethernet", facts.ethernet, needs.ETHERNET)
    if plan.nodes == 1 and check.status != "ok":
        why = "no card reports its speed" if facts.ethernet is None else needs.ETHERNET.reason
        return replace(check, status="unknown" if facts.ethernet is None else "below recommended", note=f"{why}; one machine needs none")
    if facts.ethernet is None:
        return replace(check, note="no card reports its speed: measure it between two machines, with iperf3 say")
    if check.status == "failed" and facts.infiniband is not None and facts.infiniband >= float(needs.ETHERNET.minimum):
        return replace(check, status="below recommended", note="gradients go over InfiniBand")
    return check


def infiniband(facts: Facts, plan: Plan) -> Check:
    """InfiniBand, recommended for several machines."""
    name, rate, bound = "InfiniBand", facts.infiniband, needs.INFINIBAND
    found = "none" if rate is None else f"{rate:g} Gb/s"
    status: Status = "ok" if rate is not None and rate >= float(bound.recommended) else "below recommended"
    if plan.nodes == 1 and status != "ok":
        return Check(name, found, *_limits(bound), "not applicable", f"{bound.reason}; one machine needs none (--nodes N)")
    return Check(name, found, *_limits(bound), status, bound.reason)


CHECKS: tuple[Callable[[Facts, Plan], Check], ...] = (
    pytorch,
    triton,
    cuda,
    cudnn,
    nccl,
    driver,
    gpu,
    compute_capability,
    native_bf16,
    gradients_verified,
    gpu_memory,
    cores,
    avx2,
    ram,
    disk,
    compiler,
    operating_system,
    ethernet,
    infiniband,
)


# ---- how a value is judged


def _reaches(value: str | float, limit: str) -> bool:
    """Whether a number or a version is at least `limit`; 2.11.0+cu130 and a nightly build of 2.11 count as 2.11."""
    if isinstance(value, str):
        return Version(Version(value).base_version) >= Version(limit)
    return value >= float(limit)


def _limits(bound: Bound) -> tuple[str, str]:
    """Minimum and recommended, with their unit."""
    minimum, recommended = (f"{limit} {bound.unit}".strip() if limit else "" for limit in (bound.minimum, bound.recommended))
    return minimum, recommended


def _graded(name: str, value: str | float | None, bound: Bound) -> Check:
    """A value against both limits; unknown where there is none."""
    if value is None:
        return Check(name, "not known", *_limits(bound), "unknown", bound.reason)
    found = value if isinstance(value, str) else f"{value:.4g} {bound.unit}".strip()
    if not _reaches(value, bound.minimum):
        return Check(name, found, *_limits(bound), "failed", f"{bound.remedy} ({bound.reason})")
    return Check(name, found, *_limits(bound), "ok" if _reaches(value, bound.recommended) else "below recommended", bound.reason)


def _declared(name: str, package: str, version: str | None, bound: Bound, facts: Facts) -> Check:
    """A package's version against the one that our distribution declares."""
    minimum = facts.required.get(package)
    if version is None:
        return Check(name, "none", minimum or "", minimum or "", "failed", f"{bound.remedy} ({bound.reason})")
    if minimum is None:
        return Check(name, version, "", "", "unknown", "mmrec is not installed, so its dependencies are not declared: pip install -e .")
    return _graded(name, version, bound._replace(minimum=minimum, recommended=minimum))


def _on_gpu(name: str, value: str | float | None, bound: Bound, facts: Facts, plan: Plan) -> Check:
    """As `_graded`, but not applicable without a GPU unless the config wants one; there what is missing fails, or waits for the GPU."""
    found = "none" if value is None else _graded(name, value, bound).found
    if not trains_on_gpu(facts, plan):
        return Check(name, found, *_limits(bound), "not applicable", _without_gpu(plan))
    if value is None and not facts.gpus:  # one cause, one failure: the GPU's
        return Check(name, found, *_limits(bound), "unknown", _NO_GPU_SEEN)
    if value is None:
        return Check(name, found, *_limits(bound), "failed", f"{bound.remedy} ({bound.reason})")
    return _graded(name, value, bound)


def _lenient_without_gpu(check: Check, bound: Bound, facts: Facts, plan: Plan) -> Check:
    """A minimum of training on GPUs is a recommendation on a CPU."""
    if check.status != "failed" or trains_on_gpu(facts, plan):
        return check
    return replace(check, status="below recommended", note=f"{bound.reason}; a minimum only for training on a GPU")


def _without_gpu(plan: Plan) -> str:
    return f"{plan.config} trains on a CPU" if plan.accelerator == "cpu" else "no GPU; training on a CPU is possible"


def _missing_gpu(facts: Facts, plan: Plan) -> str:
    """The remedy where a GPU is wanted and PyTorch sees none."""
    if facts.driver is not None and facts.cuda is None:
        return f"PyTorch {facts.torch} was built without CUDA and sees no GPU: {needs.CUDA.remedy}"
    if facts.driver is not None:
        return f"driver {facts.driver} is loaded, but PyTorch sees no GPU: look at CUDA_VISIBLE_DEVICES and at the driver's version"
    return f"{plan.config} trains on a GPU and there is none here: use a machine with one, or a config that fits a CPU, cpu_tiny.yaml"
