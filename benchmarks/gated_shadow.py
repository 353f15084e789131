"""What can be asked of gated_scan where nobody's fp32 states follow the float64 ones: that it is right along its own states.

With |z·w_g|/4 ≫ 1 and a negative sign the recurrence is chaotic: a rounding of 1e-7 grows until two exact programs disagree wholly, the
plain loop in fp32 with the one in float64 as well. Each step can be checked nonetheless, from the state that the operator itself gave
before it, and so can the gradients, by the adjoint along these states.
"""

from typing import Any

import torch
from torch import Tensor

STEP = 1e-4  # of fp32 states: half a unit in the last place, times a slope of up to 100
ADJOINT = 1e-2  # each of some hundred growing steps adds up to 400 roundings of the gate's argument
LARGEST = 1e30  # gradients beyond are near fp32's end


def along_its_states(
    inputs: dict[str, Any], outputs: list[Tensor], gradients: dict[str, Tensor], cotangents: list[Tensor | None]
) -> list[tuple[str, Tensor, Tensor, float]]:
    """(what, actual, expected, limit) for fp32 outputs of gated_scan; the expected in float64.

    Args:
        inputs: of the call, in float64.
        outputs: `h` and `h_last` in fp32.
        gradients: that came back, by the input's name.
        cotangents: of both outputs; None where there was none.
    """
    h, z, log_gamma = outputs[0].double(), inputs["z"], inputs["log_gamma"]
    h0 = inputs["h0"] if "h0" in inputs else torch.zeros_like(h[:, 0])
    previous = torch.cat([h0.unsqueeze(1), h[:, :-1]], dim=1)
    keep = torch.ones_like(h[..., :1]) if "reset" not in inputs else (~inputs["reset"]).double().unsqueeze(-1)
    previous = previous * keep
    gamma, write = log_gamma.exp(), -torch.expm1(log_gamma)
    group = z.shape[-1] // inputs["p"].shape[-1]
    gate = torch.sigmoid(inputs["w_g"] * previous + inputs["p"].repeat_interleave(group, dim=-1))
    found = [("output, step by step", outputs[0], write * z * gate + gamma * previous, STEP)]

    slope = write * z * gate * (1 - gate)
    jacobian = (gamma + inputs["w_g"] * slope) * keep
    g = torch.zeros_like(h) if cotangents[0] is None else cotangents[0].double().clone()
    if cotangents[1] is not None:
        g[:, -1] += cotangents[1].double()
    for t in range(h.shape[1] - 2, -1, -1):
        g[:, t] += jacobian[:, t + 1] * g[:, t + 1]
    expected = {
        "z": g * gate * write,
        "p": (g * slope).unflatten(-1, (-1, group)).sum(-1),
        "log_gamma": g * gamma * (previous - z * gate),
        "w_g": (g * slope * previous).sum((0, 1)),
        "h0": jacobian[:, 0] * g[:, 0],
    }
    found += [
        (f"d{name}, along its own states", gradients[name], value, ADJOINT)
        for name, value in expected.items()
        if name in gradients and value.abs().max() < LARGEST
    ]
    return found
