"""The four operators with random inputs, described once for all tests of this folder."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmrec.ops import exp_product_scan, gated_scan, linear_scan, memory_scan
from mmrec.ops.exp_product_scan import exp_product_scan_naive
from mmrec.ops.gated_scan import gated_scan_naive
from mmrec.ops.linear_scan import linear_scan_naive
from mmrec.ops.memory_scan import memory_scan_naive

B, D, P, H, K = 2, 12, 4, 3, 4
GATES = {
    "ordinary": (-3.0, -0.01),
    "near 1": (-1e-4, -1e-6),
    "near 0": (-13.8, -8.0),
}


@dataclass(frozen=True)
class Case:
    """An operator, its truth, and how to draw its inputs.

    Attributes:
        sequence: names of the inputs with a time dimension.
        state: name of the initial state.
        state_shape: its shape.
    """

    name: str
    op: Callable[..., tuple[Tensor, Tensor]]
    naive: Callable[..., tuple[Tensor, Tensor]]
    sequence: tuple[str, ...]
    state: str
    state_shape: tuple[int, ...]
    shapes: dict[str, tuple[int, ...]]
    has_reset: bool = True
    constant: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def draw(
        self, time: int, dtype: torch.dtype = torch.float64, gates: str = "ordinary", gate_dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Fresh random inputs, the initial state among them; logs of gates in `gate_dtype`, states in fp32 or wider."""
        low, high = GATES[gates]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        inputs = {}
        for name in self.sequence:
            shape = (B, time, *self.shapes[name])
            if name.startswith("log_"):
                inputs[name] = (low + (high - low) * torch.rand(shape, dtype=wide)).to(gate_dtype or wide)
            else:
                inputs[name] = torch.randn(shape, dtype=wide).to(dtype)
        for name, constant_shape in self.constant.items():
            inputs[name] = torch.randn(constant_shape, dtype=wide)
        inputs[self.state] = torch.randn(self.state_shape, dtype=wide)
        return inputs


CASES = [
    Case("exp_product_scan", exp_product_scan, exp_product_scan_naive, ("log_gamma",), "y0", (B, D), {"log_gamma": (D,)}, has_reset=False),
    Case("linear_scan", linear_scan, linear_scan_naive, ("x", "log_a"), "h0", (B, D), {"x": (D,), "log_a": (D,)}),
    Case(
        "gated_scan",
        gated_scan,
        gated_scan_naive,
        ("z", "p", "log_gamma"),
        "h0",
        (B, D),
        {"z": (D,), "p": (P,), "log_gamma": (D,)},
        constant={"w_g": (D,)},
    ),
    Case(
        "memory_scan",
        memory_scan,
        memory_scan_naive,
        ("q", "k", "v", "log_alpha"),
        "M0",
        (B, H, K, K),
        {"q": (H, K), "k": (H, K), "v": (H, K), "log_alpha": (H,)},
    ),
]
WITH_RESET = [case for case in CASES if case.has_reset]


def random_reset(time: int, share: float = 0.2) -> Tensor:
    """A (B, T) mask of document starts."""
    return torch.rand(B, time) < share
