"""The matrix products of a block or a network alone, back to back, and the bytes its projections move."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrec.config import MMRecConfig

_FROM_NORMED_INPUT = ("W_q", "W_k", "W_v", "W_z", "W_p")


class Product(NamedTuple):
    """One `nn.Linear` with random operands of the shapes it meets.

    Attributes:
        linear: weight (N_out, N_in) and bias.
        x: (tokens, N_in).
        reaches_input: whether the gradient goes on to what it reads.
    """

    linear: nn.Linear
    x: Tensor
    reaches_input: bool


def products_of(module: nn.Module, tokens: int) -> list[Product]:
    """All matrix products of a block or a whole network, the head included.

    The decay of the long-term memory's heads is left out: its few columns in fp32 take the time of reading their input, which counts as
    element-wise work.

    Args:
        module: what holds them as `nn.Linear`.
        tokens: rows of every product, B · T.
    """
    found = []
    inputs: dict[int, list[Tensor]] = {}
    shared: dict[str, Tensor] = {}  # by the module that reads it several times
    for name, linear in module.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        weight = linear.weight
        if linear.in_features not in inputs:
            # Two in turn: what a product has just read must not be its successor's input, in the cache already.
            inputs[linear.in_features] = list(torch.randn(2, tokens, linear.in_features, device=weight.device, dtype=weight.dtype))
        owner, _, own = name.rpartition(".")
        if own in _FROM_NORMED_INPUT and owner in shared:
            x = shared[owner]
        else:
            inputs[linear.in_features].reverse()
            x = inputs[linear.in_features][0]
            if own in _FROM_NORMED_INPUT:
                shared[owner] = x
        found.append(Product(linear, x, own != "W_planning_error"))
    return found


def products_call(products: Sequence[Product], direction: str) -> Callable[[], None]:
    """Runs the products one after another; for "fwdbwd" also those of the gradients of inputs and weights."""

    @torch.no_grad()
    def forward() -> None:
        for product in products:
            F.linear(product.x, product.linear.weight, product.linear.bias)

    if direction == "fwd":
        return forward
    cotangents: dict[int, Tensor] = {}
    for product in products:
        width = product.linear.out_features
        if width not in cotangents:
            cotangents[width] = torch.randn(product.x.shape[0], width, device=product.x.device, dtype=product.x.dtype)

    @torch.no_grad()
    def both() -> None:
        forward()
        for linear, x, reaches_input in products:
            dy = cotangents[linear.out_features]
            if linear.weight.requires_grad:
                torch.mm(dy.T, x)
                if reaches_input:
                    torch.mm(dy, linear.weight)

    return both


class Traffic(NamedTuple):
    """Bytes that the six projections of a block move, each operand of each product once.

    Attributes:
        weights, inputs, outputs: of the forward.
        times: how often each moves: 1 forward; 3 with the backward, whose two products have the same three operands.
    """

    weights: int
    inputs: int
    outputs: int
    times: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.times * (self.weights + self.inputs + self.outputs)


def projection_traffic(config: MMRecConfig, tokens: int, itemsize: int, hem: bool, direction: str) -> Traffic:
    """The founding document's arithmetic (weights and inputs) with what is written added; biases are too small to count.

    Six projections read the normed input five times and p once, and hold W_e : P → D; one reads it once and holds the folded D → D.
    """
    D, P = config.model_dim, config.pe_width
    weights = D * (5 * D + P) if hem else D * (4 * D + 2 * P)
    inputs = D if hem else 5 * D + P
    times = 1 if direction == "fwd" else 3
    return Traffic(weights * itemsize, tokens * inputs * itemsize, tokens * (5 * D + P) * itemsize, times)
