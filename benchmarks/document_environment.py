"""The tables of section 2: what the founding document asks of a machine, and what this code needs. Numbers are those `doctor` checks;
of a GPU's memory, where it takes a config's estimate, the card that holds it."""

import tomllib
from collections.abc import Sequence
from typing import NamedTuple

from document_markdown import UNKNOWN, captioned, markdown, table
from document_sources import ROOT, Results
from packaging.requirements import Requirement

from mmrec.commandline import machine_needs as needs
from mmrec.commandline.configs import config_layers, merge
from mmrec.commandline.machine_needs import Bound
from mmrec.commandline.memory_estimate import Estimate, estimate


class Asked(NamedTuple):
    """What the founding document asks for."""

    minimum: str
    recommended: str = UNKNOWN


def dependencies(extra: str | None = None) -> dict[str, str]:
    """Lower bounds that pyproject.toml declares, by package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    wanted = [Requirement(line) for line in lines]
    return {need.name: ", ".join(part.version for part in need.specifier if part.operator == ">=") or "any" for need in wanted}


class Card(NamedTuple):
    """The smallest usual size of a GPU's memory that is enough, in GB, and why."""

    card: int
    why: str


CARDS = (16, 24, 32, 40, 48, 80, 96, 141, 192)  # GB of GPUs that are sold


def _card(need: float, why: str, allocator: float = needs.ALLOCATOR) -> Card:
    return Card(next(size for size in CARDS if size >= allocator * need), why)


def gpu_for_training() -> Card:
    """For the founding document's 7B, as shipped."""
    need = _estimate_7b().total / 1e9
    why = (
        f"`configs` estimates {need:.1f} GB of `{CONFIG_7B}`, BF16 with 8-bit moments, whose batch fills it; the allocator adds 5 % or more"
    )
    return _card(need, why, needs.LEAST_ALLOCATOR)


def gpu_for_decoding() -> Card:
    """For its weights in BF16, without UBÖO's."""
    need = 2 * _estimate_7b().parameters_inference / 1e9
    return _card(need, f"{need:.1f} GB of weights in BF16; state and buffers are small")


CONFIG_7B = "a100_7b"


def _estimate_7b() -> Estimate:
    return estimate(CONFIG_7B, merge(config_layers(CONFIG_7B)))


def _line(name: str, asked: Asked, bound: Bound) -> list[str]:
    limits = [f"{limit} {bound.unit}".strip() if limit else UNKNOWN for limit in (bound.minimum, bound.recommended)]
    why = bound.reason.partition("; the founding document")[0]
    return [name, *asked, *limits, why or UNKNOWN]


def _table(lines: Sequence[Sequence[str]]) -> str:
    titles = ("", "the founding document: minimum", "recommended", "needed here: minimum", "recommended", "why")
    return markdown(titles, lines, words=range(len(titles)))


@table
def environment_cuda(results: Results) -> str:
    """§2.1."""
    return _table(
        [
            _line("CUDA (that PyTorch was built for)", Asked("11.8", "12.1"), needs.CUDA),
            _line("cuDNN", Asked("8.6", "8.9"), needs.CUDNN),
            _line("NCCL (several GPUs)", Asked("2.15", "2.18"), needs.NCCL),
            *(_line(f"NVIDIA driver, CUDA {major}", Asked("520.61.05"), bound) for major, bound in needs.DRIVERS.items()),
        ]
    )


@table
def environment_packages(results: Results) -> str:
    """§2.2."""
    found = dependencies()
    torch, triton = (bound._replace(minimum=found[name], recommended=found[name]) for name, bound in _VERSIONS.items())
    return _table([_line("PyTorch", Asked("2.0", "2.1"), torch), _line("Triton", Asked("2.0", "2.2"), triton)])


_VERSIONS = {"torch": needs.PYTORCH, "triton": needs.TRITON}


@table
def environment_dependencies(results: Results) -> str:
    """§2.2.3."""
    rows = [[f"`{name}`", minimum, "always"] for name, minimum in dependencies().items()]
    for extra in ("train", "bench", "dev"):
        rows += [[f"`{name}`", minimum, f"extra `{extra}`"] for name, minimum in dependencies(extra).items()]
    return markdown(("package", "minimum", "installed"), rows, words=(0, 2))


@table
def environment_hardware(results: Results) -> str:
    """§2.3.1 and §2.3.2."""
    training, decoding = gpu_for_training(), gpu_for_decoding()
    return _table(
        [
            _line("compute capability", Asked("7.0", "8.0"), needs.CAPABILITY),
            ["GPU memory to train 7B", "40 GB", "80 GB", f"{training.card} GB", f"{training.card} GB", training.why],
            ["GPU memory to decode 7B", UNKNOWN, UNKNOWN, f"about {decoding.card} GB", UNKNOWN, decoding.why],
            _line("CPU cores", Asked("8", "16"), needs.CORES),
            _line("RAM", Asked("64 GB", "128 GB"), needs.RAM),
            ["CPU", "x86-64", "AVX2", "any that PyTorch runs on", "AVX2", "PyTorch's kernels for CPUs are written for it"],
        ]
    )


@table
def environment_system(results: Results) -> str:
    """§2.3.3."""
    return _table(
        [
            [
                "operating system",
                "Ubuntu 20.04 or CentOS 8",
                UNKNOWN,
                "Linux",
                needs.DISTRIBUTIONS_IN_WORDS,
                "Triton is published for no other",
            ],
            ["C compiler", "GCC 9.0", UNKNOWN, "any", f"GCC {needs.GCC.recommended}", "Triton compiles a small launcher at its first run"],
            _line("Ethernet (several machines)", Asked("10 Gb/s"), needs.ETHERNET),
            _line("InfiniBand (several machines)", Asked(UNKNOWN, "200 Gb/s"), needs.INFINIBAND),
        ]
    )


@table
def environment_summary(results: Results) -> str:
    """§5.3."""
    found = dependencies()

    def both(name: str, bound: Bound, asked: str) -> list[str]:
        unit = f" {bound.unit}" if bound.unit else ""
        return [name, asked, f"{bound.minimum}{unit}", f"{bound.recommended}{unit}"]

    lines = [
        both("CUDA", needs.CUDA, "11.8, better 12.1"),
        ["PyTorch", "2.0, better 2.1", found["torch"], found["torch"]],
        ["Triton", "2.0, better 2.2", found["triton"], found["triton"]],
        both("compute capability", needs.CAPABILITY, "7.0, better 8.0"),
        ["GPU memory to train 7B", "40 GB, better 80 GB", f"{gpu_for_training().card} GB", f"{gpu_for_training().card} GB"],
        ["GPU memory to decode 7B in BF16", UNKNOWN, f"about {gpu_for_decoding().card} GB", UNKNOWN],
    ]
    return markdown(("", "the founding document", "minimum", "recommended"), lines)


@table
def verified_gradients(results: Results) -> str:
    """§2.2.2: where gradients were compared with float64."""
    lines = [
        [f"{architecture[2]}.{architecture[3:]}", version, f"[{file.rpartition('/')[2]}](../{file})"]
        for (architecture, version), file in needs.VERIFIED.items()
    ]
    by_tests = ", ".join(f"`{name}`" for name in needs.BY_TESTS)
    return captioned(
        markdown(("compute capability", "Triton", "rows"), lines, words=range(3)),
        f"{by_tests}, which a block runs, by `pytest -m gpu` on an H100 with Triton 3.6.0 ([log.md](log.md), 2026-11-25).",
    )
