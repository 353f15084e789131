"""Weights that take nothing from the global random state, so that a part more or less does not change how the others start."""

import torch
from torch import Tensor, nn


def empty_linear(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    """An `nn.Linear` on the default device with uninitialised memory; the usual constructor would draw numbers."""
    device = torch.get_default_device()
    with torch.device("meta"):
        linear = nn.Linear(in_features, out_features, bias=bias)
    return linear if device.type == "meta" else linear.to_empty(device=device)


@torch.no_grad()
def draw_apart(weight: Tensor, std: float, index: int) -> None:
    """Fill `weight` with N(0, std²) from a generator of its own, seeded by the global random state, which stays as it was.

    Args:
        weight: the tensor to fill.
        std: standard deviation.
        index: tells weights apart that are drawn from the same global state.
    """
    if weight.is_meta:
        return
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        seed = int(torch.randint(2**62, (), device=weight.device)) + index
    weight.normal_(std=std, generator=torch.Generator(device=weight.device).manual_seed(seed))
