"""A memory read and written at addresses: inputs, the operators one after another as a block calls them, and the truth."""

from dataclasses import dataclass
from typing import Any

import torch
from cases import MEMORY, Setting
from recorded import operator
from torch import Tensor

from mmrec.ops.memory_address import memory_address_naive
from mmrec.ops.memory_scan import memory_scan_naive

SCALE = 0.7
GRADIENTS = ["q", "k", "v", "log_alpha", "M0", "h"]  # in the order in which the operator takes them


@dataclass(frozen=True)
class Addressed:
    """Inputs and cotangents.

    Attributes:
        inputs: q, k, v, log_alpha, h, and M0 where given.
        reset, dM_last, dh_more: None where not given.
    """

    inputs: dict[str, Tensor]
    reset: Tensor | None
    dr: Tensor
    dM_last: Tensor | None
    dh_more: Tensor | None

    def forward(self) -> tuple[Tensor, ...]:
        """Addresses, their scales, and the memories that are kept."""
        given = self.inputs
        query, key, *scales = operator("memory_address_scaled")(given["q"], given["k"], given["h"])
        memories = operator("memory_scan_kept")(query, key, given["v"], given["log_alpha"], given.get("M0"), self.reset, SCALE)[2]
        return query, key, *scales, memories

    def arguments(self, kept: bool = True) -> tuple[Any, ...]:
        """What `addressed_memory_bwd_out` takes before its outputs."""
        query, key, q_scale, k_scale, memories = self.forward()
        given = (self.inputs["v"], self.inputs["log_alpha"], self.inputs.get("M0"), self.reset, SCALE)
        return self.dr, self.dM_last, query, key, *given, memories if kept else None, q_scale, k_scale, self.dh_more

    def outputs(self) -> list[Tensor]:
        """Room for the gradients, NaN."""
        batch, _, heads, width = self.inputs["k"].shape
        state = torch.empty((batch, heads, width, self.inputs["v"].shape[-1]), dtype=self.inputs["log_alpha"].dtype, device=self.dr.device)
        return [torch.full_like(self.inputs.get(name, state), float("nan")) for name in GRADIENTS]

    def gradients(self, kept: bool = True) -> dict[str, Tensor]:
        """By the name of what they belong to."""
        outputs = self.outputs()
        operator("addressed_memory_bwd_out")(*self.arguments(kept), *outputs)
        return dict(zip(GRADIENTS, outputs, strict=True))

    def truth(self) -> dict[str, Tensor]:
        """The same in float64 by autograd through the naive forms."""
        leaves = {name: tensor.detach().double().requires_grad_() for name, tensor in self.inputs.items()}
        query, key = memory_address_naive(leaves["q"], leaves["k"], leaves["h"])
        results = memory_scan_naive(query, key, leaves["v"], leaves["log_alpha"], leaves.get("M0"), self.reset, scale=SCALE)
        cotangents = [(results[0], self.dr), (results[1], self.dM_last), (leaves["h"] * 1, self.dh_more)]
        used = [(result, cotangent.double()) for result, cotangent in cotangents if cotangent is not None]
        return dict(zip(leaves, torch.autograd.grad([r for r, _ in used], list(leaves.values()), [c for _, c in used]), strict=True))


def draw(setting: Setting, time: int, everything: bool = True) -> Addressed:
    """Random ones; `everything`: with a state, document starts and all cotangents, else with none of what may be missing."""
    inputs = MEMORY.draw(setting, time)
    inputs["h"] = torch.randn_like(inputs["q"])
    state = inputs.pop("M0")
    if everything:
        inputs["M0"] = state
    reset = MEMORY.reset(setting, time) if everything else None
    dr, dh_more = (torch.randn(inputs[name].shape).bfloat16().to(inputs[name]) for name in ("v", "h"))
    return Addressed(inputs, reset, dr, torch.randn_like(state) if everything else None, dh_more if everything else None)
