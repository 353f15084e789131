"""HEM's parity: a block with six projections and its fused copy are one function, outputs and gradients."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mmrec.blocks.hem import FusedProjections, SeparateProjections
from mmrec.blocks.mm_rec_block import MMRecBlock
from mmrec.config import MMRecConfig
from mmrec.measuring.errors import relative_error


class BlockPair(NamedTuple):
    """The same block twice.

    Attributes:
        off: with six projections.
        on: its copy with one.
    """

    off: MMRecBlock
    on: MMRecBlock


@contextmanager
def built_on(where: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Modules made within are made on the device and in the dtype at once; what a network keeps in fp32 stays in fp32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(where):
            yield
    finally:
        torch.set_default_dtype(before)


def block_pair(config: MMRecConfig, where: torch.device, dtype: torch.dtype, layer_index: int = 0) -> BlockPair:
    """One block of the network, that of a layer, in both forms; the projections' biases are drawn, so that their folding is seen."""
    with built_on(where, dtype):
        off = MMRecBlock(replace(config, use_hem=False), layer_index)
    off = off.to(dtype)  # in float64 also what is made in fp32
    assert isinstance(off.projections, SeparateProjections)
    with torch.no_grad():
        for linear in off.projections.children():
            assert isinstance(linear, torch.nn.Linear)
            linear.bias.normal_(std=0.1)
    on = copy.deepcopy(off)
    on.set_hem(True)
    return BlockPair(off, on)


def _quantities(block: MMRecBlock, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    """Outputs and gradients of a block by name."""
    leaf = x.detach().clone().requires_grad_()
    block.zero_grad(set_to_none=True)
    y, planning = block(leaf, return_auxiliary_loss=True)
    auxiliary = planning.mean()
    ((y * cotangent).sum() + auxiliary).backward()
    assert leaf.grad is not None
    gradients = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    block.zero_grad(set_to_none=True)
    found = {"output": y.detach(), "dx": leaf.grad} | {name.removeprefix("projections."): g for name, g in gradients.items()}
    return found | ({"L_aux": auxiliary.detach()} if block.mdi.use_uboo else {})


def _separate_gradients(pair: BlockPair, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The fused block's gradients as those of six projections, by the relations of docs/math.md; products in float64."""
    six, one = pair.off.projections, pair.on.projections
    assert isinstance(six, SeparateProjections)
    assert isinstance(one, FusedProjections)
    dW, db = gradients.pop("W_fused.weight").split(one.widths), gradients.pop("W_fused.bias").split(one.widths)
    W_p, b_p, W_e = six.W_p.weight.double(), six.W_p.bias.double(), six.W_e.weight.double()
    dW_E, db_E = dW[5].double(), db[5].double()
    found = {f"W_{name}.weight": dW[index] for index, name in enumerate("qkvz")}
    found |= {f"W_{name}.bias": db[index] for index, name in enumerate("qkvz")}
    found |= {"W_e.weight": dW_E @ W_p.T + torch.outer(db_E, b_p), "W_e.bias": db_E}
    return found | {"W_p.weight": dW[4] + W_e.T @ dW_E, "W_p.bias": db[4] + W_e.T @ db_E}


def parity_errors(pair: BlockPair, x: Tensor, cotangent: Tensor) -> dict[str, float]:
    """Relative errors of the fused block by quantity, the six projections' being the reference.

    Args:
        pair: the block in both forms.
        x, cotangent: (B, T, D), the input and the gradient of the output.
    """
    expected = _quantities(pair.off, x, cotangent)
    found = _quantities(pair.on, x, cotangent)
    with torch.no_grad():
        found |= _separate_gradients(pair, found)
        missing = expected.keys() ^ found.keys()
        if missing:
            raise ValueError(f"the two forms of the block have not the same gradients: {', '.join(sorted(missing))}")
        return {name: relative_error(found[name], wanted) for name, wanted in expected.items()}
