"""The recurrences with random inputs and the settings they run in, described once for all tests of this folder."""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from support import TOLERANCE
from torch import Tensor

from mmrec.core.decay import LOG_GAMMA_MAX, LOG_GAMMA_MIN
from mmrec.ops import exp_product_scan, gated_scan, gated_scan_from_logits, linear_scan, memory_scan
from mmrec.ops.exp_product_scan import exp_product_scan_naive
from mmrec.ops.gated_scan import gated_scan_from_logits_naive, gated_scan_naive
from mmrec.ops.linear_scan import linear_scan_naive
from mmrec.ops.memory_scan import memory_scan_naive

GATES = {
    "ordinary": (-3.0, -0.01),
    "near 1": (-1e-4, -1e-6),
    "near 0": (-13.8, -8.0),
}


@dataclass(frozen=True)
class Setting:
    """Where an operator runs and on how much; one test body serves all of them.

    Attributes:
        dtype: of the inputs; gates, `w_g` and states are fp32 (float64 for float64 inputs).
        gate_dtype: of the logs of the gates where it is another.
        sizes: the value of every letter of a shape but T.
        marks: which pytest run it belongs to.
        changed: what `resized` changed, for the test's name.
    """

    name: str
    dtype: torch.dtype
    device: str = "cpu"
    gate_dtype: torch.dtype | None = None
    sizes: dict[str, int] = field(default_factory=lambda: {"B": 2, "D": 12, "P": 4, "H": 3, "K": 4, "V": 4})
    marks: tuple[pytest.MarkDecorator, ...] = ()
    changed: str = ""

    @property
    def wide(self) -> torch.dtype:
        """Dtype of states and gates."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def coarsest(self) -> torch.dtype:
        """The dtype that rounds most; gradients pass through it."""
        return max((self.dtype, self.gate_dtype or self.wide), key=TOLERANCE.__getitem__)

    def resized(self, **sizes: int) -> "Setting":
        """The same with some letters changed."""
        return replace(self, sizes={**self.sizes, **sizes}, changed="".join(f"-{letter}{size}" for letter, size in sizes.items()))


# Two stripes of channels with a tail, groups of channels that straddle them, and heads narrower than a block.
SMALL = {"B": 2, "D": 12, "P": 4, "H": 2, "K": 12, "V": 12}
REAL = {"B": 2, "D": 640, "P": 128, "H": 5, "K": 128, "V": 128}
NARROW = {"B": 1, "D": 64, "P": 64, "H": 1, "K": 64, "V": 64}
interpreted, gpu = (pytest.mark.interpreted,), (pytest.mark.gpu,)

CPU = Setting("cpu-float64", torch.float64)
CPU_LOW = [Setting("cpu-float32", torch.float32), Setting("cpu-bfloat16", torch.bfloat16)]
INTERPRETED = Setting("interpreted-float32", torch.float32, sizes=SMALL, marks=interpreted)
INTERPRETED_LOW = [
    Setting("interpreted-bfloat16", torch.bfloat16, sizes=SMALL, marks=interpreted),
    Setting("interpreted-float16", torch.float16, sizes=SMALL, marks=interpreted),
    Setting("interpreted-bfloat16-gates", torch.float32, gate_dtype=torch.bfloat16, sizes=SMALL, marks=interpreted),
]
GPU = Setting("gpu-float32", torch.float32, "cuda", sizes=REAL, marks=gpu)
GPU_LOW = [
    Setting("gpu-bfloat16", torch.bfloat16, "cuda", sizes=REAL, marks=gpu),
    Setting("gpu-float16", torch.float16, "cuda", sizes=REAL, marks=gpu),
    Setting("gpu-bfloat16-gates", torch.bfloat16, "cuda", gate_dtype=torch.bfloat16, sizes=REAL, marks=gpu),
]
GPU_NARROW = Setting("gpu-narrow", torch.float32, "cuda", sizes=NARROW, marks=gpu)


def in_settings(settings_and_times: Iterable[tuple[Setting, int]]) -> pytest.MarkDecorator:
    """Parametrise `setting` and `time`; each run of pytest takes the settings it can serve."""
    return pytest.mark.parametrize(
        ("setting", "time"),
        [
            pytest.param(setting, time, marks=setting.marks, id=f"{setting.name}{setting.changed}-T{time}")
            for setting, time in settings_and_times
        ],
    )


# float64 in PyTorch, fp32 through the interpreter, fp32 and bf16 on a GPU: what a test of a property wants.
everywhere = in_settings([(CPU, 70), (INTERPRETED, 37), (GPU, 700), (GPU_LOW[0], 700)])


@dataclass(frozen=True)
class Case:
    """An operator, its truth, and how to draw its inputs.

    Attributes:
        shapes: the letters of every input's shape, in the operator's order but for `reset`; the first gives the output its dtype.
        state: name of the initial state.
    """

    name: str
    op: Callable[..., tuple[Tensor, Tensor]]
    naive: Callable[..., tuple[Tensor, Tensor]]
    shapes: dict[str, str]
    state: str
    has_reset: bool = True

    @property
    def sequence(self) -> list[str]:
        """Names of the inputs with a time dimension."""
        return [name for name, letters in self.shapes.items() if "T" in letters]

    @property
    def constant(self) -> list[str]:
        """Names of the inputs that all sequences share."""
        return [name for name, letters in self.shapes.items() if "B" not in letters]

    def draw(self, setting: Setting, time: int, gates: str = "ordinary") -> dict[str, Tensor]:
        """Fresh random inputs, the initial state among them."""
        low, high = GATES[gates]
        inputs = {}
        for name, letters in self.shapes.items():
            shape = tuple({**setting.sizes, "T": time}[letter] for letter in letters)
            if name.startswith("log_"):
                logs = low + (high - low) * torch.rand(shape, dtype=setting.wide)
                if self.name == "exp_product_scan":
                    logs *= min(1.0, 20 / (-low * max(time, 1)))  # else the product lies below, or the sum rounds above, what fp32 allows
                inputs[name] = logs.to(setting.device, setting.gate_dtype or setting.wide)
            elif name.endswith("bias"):
                logs = (low + (high - low) * torch.rand(shape, dtype=setting.wide)) / 2  # of one gate of two
                inputs[name] = (logs - torch.log(-torch.expm1(logs))).to(setting.device)
            else:
                narrow = "T" in letters
                inputs[name] = torch.randn(shape, dtype=setting.wide).to(setting.device, setting.dtype if narrow else setting.wide)
        return inputs

    def reset(self, setting: Setting, time: int, share: float = 0.2) -> Tensor | None:
        """A (B, T) mask of document starts, None where the operator takes none."""
        return (torch.rand(setting.sizes["B"], time) < share).to(setting.device) if self.has_reset else None

    def output_limits(self, setting: Setting) -> tuple[float | None, float | None]:
        """Tolerances of the two outputs; None is the table's for the output's own dtype."""
        # A memory of narrow inputs is a matrix product whose operands, decays among them, are rounded to their dtype.
        return (None, TOLERANCE[setting.dtype]) if self.name == "memory_scan" else (None, None)

    def gradient_limit(self, setting: Setting, gates: str = "ordinary", name: str = "") -> float:
        """Tolerance of a gradient."""
        limit = TOLERANCE[setting.coarsest]
        if self.name == "memory_scan" and setting.dtype == torch.float32:
            # Products of fp32 on tensor cores are sums of three TF32 products, and dlog α a difference of sums over a whole chunk.
            limit = max(limit, 1e-4)
        if self.name == "memory_scan" and setting.dtype == torch.float64 and gates == "near 0" and name == "log_alpha":
            # The chunked form sums differences of cumulative logs: a gradient of 1e-4 is what remains of terms of order 1.
            limit = 1e-10
        return limit


CASES = [
    Case("exp_product_scan", exp_product_scan, exp_product_scan_naive, {"log_gamma": "BTD", "y0": "BD"}, "y0", has_reset=False),
    Case("linear_scan", linear_scan, linear_scan_naive, {"x": "BTD", "log_a": "BTD", "h0": "BD"}, "h0"),
    Case("gated_scan", gated_scan, gated_scan_naive, {"z": "BTD", "p": "BTP", "log_gamma": "BTD", "w_g": "D", "h0": "BD"}, "h0"),
    Case(
        "memory_scan",
        memory_scan,
        memory_scan_naive,
        {"q": "BTHK", "k": "BTHK", "v": "BTHV", "log_alpha": "BTH", "M0": "BHKV"},
        "M0",
    ),
    Case(
        "gated_scan_from_logits",
        partial(gated_scan_from_logits, low=LOG_GAMMA_MIN, high=LOG_GAMMA_MAX),
        partial(gated_scan_from_logits_naive, low=LOG_GAMMA_MIN, high=LOG_GAMMA_MAX),
        {"z": "BTD", "p": "BTP", "logits": "BTD", "bias": "D", "context": "BTD", "context_bias": "D", "w_g": "D", "h0": "BD"},
        "h0",
    ),
]
EXP, LINEAR, GATED, MEMORY, GATED_LOGITS = CASES
ONE_GATE = replace(
    GATED_LOGITS,
    op=partial(GATED_LOGITS.op, context=None, context_bias=None),
    naive=partial(GATED_LOGITS.naive, context=None, context_bias=None),
    shapes={name: letters for name, letters in GATED_LOGITS.shapes.items() if "context" not in name},
)
# Where not in `kernels` and `operator` of a folder of the operator's name.
_LAUNCHERS = {"memory_scan": "memory_scan.launchers", "gated_scan_from_logits": "gated_scan.kernels_from_logits"}
_OPERATORS = {"gated_scan_from_logits": "gated_scan.operator_from_logits"}


def launchers(operator: str) -> ModuleType:
    """Where `launch_forward` and `launch_backward` of an operator are."""
    return importlib.import_module("mmrec.ops." + _LAUNCHERS.get(operator, f"{operator}.kernels"))


def definition(operator: str) -> ModuleType:
    """Where an operator chooses between its kernels and its PyTorch form."""
    return importlib.import_module("mmrec.ops." + _OPERATORS.get(operator, f"{operator}.operator"))


by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
with_reset = pytest.mark.parametrize("case", [case for case in CASES if case.has_reset], ids=lambda case: case.name)


def in_float64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values in the dtype of the truth."""
    return {name: tensor.double() for name, tensor in inputs.items()}


def gradients(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: dict[str, Tensor],
    reset: Tensor | None = None,
    autocast: bool = False,
    **options: Any,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and the gradient of a random projection of *all* outputs to every input."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    device = next(iter(leaves.values())).device.type
    if reset is not None:
        options["reset"] = reset
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        outputs = function(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    # Of bf16's few digits, so that the cotangent is the same in every dtype.
    projections = [torch.randn(o.shape, generator=generator).bfloat16().to(o.device, o.dtype) for o in outputs]
    torch.autograd.backward(outputs, projections)
    return list(outputs), {name: leaf.grad for name, leaf in leaves.items()}
