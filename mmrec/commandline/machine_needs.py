"""What a machine should have, and why: the founding document's section 2, with its minima raised to what this code needs."""

from dataclasses import dataclass
from typing import NamedTuple


class Bound(NamedTuple):
    """A minimum, what is better, where they come from, and what to do below the minimum; `unit` follows the numbers."""

    minimum: str
    recommended: str
    reason: str
    remedy: str
    unit: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run asks of the machine; without a config nothing is known of its sizes.

    Attributes:
        config: its name.
        accelerator: Lightning's name of what it trains on.
        parameters: of the network.
        memory: bytes a GPU, from the estimate.
        checkpoint: bytes of one.
        newest_kept, best_kept: as `checkpoint_keep` and `checkpoint_best` say; `last.ckpt` stays whatever they are.
        nodes: machines that train together.
    """

    config: str | None = None
    accelerator: str = "auto"
    parameters: int = 0
    memory: int | None = None
    checkpoint: int | None = None
    newest_kept: int = 2
    best_kept: bool = True
    nodes: int = 1

    @property
    def checkpoints(self) -> int:
        """Checkpoints that lie side by side at most: the next is written before the oldest of those that stay is removed."""
        return max(self.newest_kept, 1) + self.best_kept + 1


# Versions of PyTorch and Triton are declared in pyproject.toml and filled in from there.
PYTORCH = Bound("", "", "declared in pyproject.toml; the founding document: 2.0", "pip install --upgrade torch")
TRITON = Bound(
    "",
    "",
    "declared in pyproject.toml, the one that PyTorch 2.11 brings; the founding document: 2.0",
    "upgrade PyTorch, whose CUDA builds bring their Triton",
)
CUDA = Bound(
    "12.6",
    "13.0",
    "PyTorch 2.11 is built for 12.6, 12.8 and 13.0, and 13.0 is what we measured with; the founding document: 11.8",
    "install a build of PyTorch for CUDA 12.6 or later (https://pytorch.org/get-started)",
)
CUDNN = Bound(
    "9.0",
    "9.19",
    "PyTorch 2.7 came with cuDNN 9 already, 2.11 for CUDA 13.0 comes with 9.19; the founding document: 8.6",
    "install a build of PyTorch that brings cuDNN 9",
)
NCCL = Bound(
    "2.21",
    "2.28",
    "PyTorch 2.7 came with 2.21 at the oldest, 2.11 for CUDA 13.0 comes with 2.28; the founding document: 2.15",
    "install a build of PyTorch that brings NCCL 2.21 or later",
)
# By CUDA's major version: the oldest driver that runs its programs, and the one released with its oldest toolkit above.
DRIVERS = {
    12: Bound(
        "525.60.13",
        "560.28.03",
        "NVIDIA's minor-version compatibility runs CUDA 12.x from 525.60.13 on, 560.28.03 came with 12.6; the founding document: 520.61.05",
        "install NVIDIA's driver 560.28.03 or later",
    ),
    13: Bound(
        "580.65.06",
        "580.65.06",
        "CUDA 13.x runs with no older driver; the founding document: 520.61.05",
        "install NVIDIA's driver 580.65.06 or later, or a build of PyTorch for CUDA 12.6, which runs from 525.60.13 on",
    ),
}
CAPABILITY = Bound(
    "8.0",
    "9.0",
    "we train in BF16, which earlier GPUs only emulate; tile sizes were tuned on 9.0; the founding document: 7.0",
    "train on an A100, H100 or a later GPU",
)
# The founding document's, for its 7B model. What the config's own estimate says is taken where that is more.
GPU_MEMORY_7B = Bound("40", "80", "", "", "GB")
BILLIONS_OF_7B = (6.5, 8.0)
ALLOCATOR = 1.15  # what the estimate leaves out: the allocator's rounding and fragments, 5 to 15 %
LEAST_ALLOCATOR = 1.05
CORES = Bound(
    "8",
    "16",
    "data workers tokenise while the GPU trains; the founding document's",
    "reserve at least 8 cores, or tokenise ahead with the command prepare",
)
RAM = Bound("64", "128", "data workers and the shuffle buffer; the founding document's", "reserve at least 64 GB of memory", "GB")
GCC = Bound("9.0", "9.0", "the founding document's; Triton compiles a small launcher in C at its first run, for which any will do", "")
ETHERNET = Bound(
    "10", "10", "gradients cross it between machines; the founding document's", "train on one machine or get a faster network", "Gb/s"
)
INFINIBAND = Bound("", "200", "the founding document's, for several machines", "", "Gb/s")
CHECKPOINTS_RECOMMENDED = 10  # or more, where more than half of that lie side by side in one run

# Oldest releases by the ID of /etc/os-release; "recommended" in the founding document. CentOS 8 and its kin have the same libraries.
DISTRIBUTIONS = {"ubuntu": "20.04", "centos": "8", "rhel": "8", "rocky": "8", "almalinux": "8"}
DISTRIBUTIONS_IN_WORDS = "Ubuntu 20.04, CentOS or RHEL 8"

# Where our gradients were compared with float64: architecture and Triton's minor version, and the rows that say so.
VERIFIED = {("sm90", "3.6"): "benchmarks/results/ops_h200.json"}
# What a block runs and the file has no rows of: its tests passed there (docs/log.md).
BY_TESTS = ("gated_scan_from_logits", "addressed_memory_bwd_out")
# Releases that gave others wrong gradients on Hopper, by a transposed accumulator handed to the next product
# (flash-linear-attention, issue 640; pull request 983 lifts the ban from 3.7.1 on).
MISCOMPILED_ON_HOPPER = ("3.4", "3.7.1")
