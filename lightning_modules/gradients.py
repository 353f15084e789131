"""Norms of gradients, clipping, and how the auxiliary loss's gradient stands to the main one's."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_
from torch.optim import Optimizer

from callbacks.shards import local_part
from lightning_modules.skipping import divides_gradients, skip_unless_finite
from mmrec.model import MMRecModel

_NORM_EPS = 1e-6  # as torch's `clip_grads_with_norm_` has it


def total_norm(tensors: list[Tensor]) -> Tensor:
    """‖·‖₂ of all `tensors` as one vector, 0-dim; summed in fp32 or wider, since a bf16 sum of squares loses percents.

    Of tensors in shards it is the norm over all ranks, in one collective; those that are whole count once.
    """
    shards = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    norm = _plain_norm([local_part(tensor) for tensor in shards or tensors])
    if not shards:
        return norm
    squares = norm.double().square()
    dist.all_reduce(squares, group=shards[0].device_mesh.get_group())
    if whole := [tensor for tensor in tensors if not isinstance(tensor, DTensor)]:
        squares += _plain_norm(whole).double().square()
    return squares.sqrt().to(norm.dtype)


def _plain_norm(tensors: Sequence[Tensor]) -> Tensor:
    dtypes = dict.fromkeys(tensor.dtype for tensor in tensors)  # in a fixed order: the sum's rounding depends on it
    wide = torch.promote_types(torch.float32, max(dtypes, key=lambda dtype: torch.finfo(dtype).bits))
    norms: list[Tensor] = []
    for dtype in dtypes:  # one call for all of a dtype: a kernel or two a tensor would take as long to launch as a block's forward
        norms += torch._foreach_norm([tensor for tensor in tensors if tensor.dtype == dtype], 2, wide)
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_gradients(optimizer: Optimizer, clip_val: float | None, algorithm: str | None) -> Tensor | None:
    """Clip the gradients of the optimiser's parameters, and have the step skipped where they are not finite (`skip_unless_finite`).

    Nothing waits for the device, but for an optimiser that cannot skip by itself.

    By norm, a fused optimiser of torch's does so itself as it steps: it divides by `grad_scale`, as a loss scaler would have it, and leaves
    `.grad` divided (our 8-bit one leaves it alone); what is set here holds for every step until the next call. A pass of its own would read
    and write every gradient once more. For all other optimisers it is done in place.

    Args:
        optimizer: the optimiser.
        clip_val: the bound; None or 0 clips nothing.
        algorithm: "norm" (also None), or "value".

    Returns:
        The norm before clipping, 0-dim; None where no parameter has a gradient.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # out of Lightning's wrapper
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not parameters:
        return None
    norm = total_norm([p.grad for p in parameters if p.grad is not None])
    if skip_unless_finite(optimizer, parameters, norm):
        return norm
    if clip_val and algorithm == "value":
        clip_grad_value_(parameters, clip_val)
    elif clip_val and divides_gradients(optimizer):
        optimizer.grad_scale = ((norm + _NORM_EPS) / clip_val).clamp(min=1).float()  # type: ignore[attr-defined]
        return norm
    elif clip_val:
        clip_grads_with_norm_(parameters, clip_val, norm)
    if divides_gradients(optimizer):
        optimizer.grad_scale = None  # type: ignore[attr-defined]
    return norm


def auxiliary_gradient_statistics(network: MMRecModel, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """How strong and how aligned the auxiliary gradient is, over the parameters that the main loss reaches.

    With `orthogonalize` the auxiliary gradient depends on the main one, and `g_aux = g_total − g_main`. Without, it is taken of the
    auxiliary loss alone: a difference would drown a small one in rounding. Two forwards and backwards; nothing is accumulated into
    `.grad`, and no random number is drawn. Needs memory for two gradients of the network.

    Returns:
        `grad_norm_ratio` = ‖g_aux‖/‖g_main‖ and `grad_cosine` = ⟨g_aux, g_main⟩/(‖g_aux‖‖g_main‖), 0-dim fp32; 0 where g_aux is 0.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    with torch.enable_grad():
        main = torch.autograd.grad(network.loss(batch).main, parameters, allow_unused=True)
        output = network.loss(batch)
        if network.config.orthogonalize:
            total = torch.autograd.grad(output.loss, parameters, allow_unused=True)
            auxiliary = [None if m is None or t is None else t.float() - m.float() for m, t in zip(main, total, strict=True)]
        elif output.auxiliary.requires_grad:
            auxiliary = torch.autograd.grad(output.auxiliary, parameters, allow_unused=True)
        else:
            auxiliary = [None] * len(parameters)
    pairs = [
        (m.float(), torch.zeros_like(m, dtype=torch.float32) if a is None else a.float())
        for m, a in zip(main, auxiliary, strict=True)
        if m is not None
    ]
    norm_main = total_norm([m for m, _ in pairs])
    norm_aux = total_norm([a for _, a in pairs])
    inner = torch.stack([(m * a).sum() for m, a in pairs]).sum()
    tiny = torch.finfo(torch.float32).tiny
    cosine = inner / norm_main.clamp(min=tiny) / norm_aux.clamp(min=tiny)
    return {"grad_norm_ratio": norm_aux / norm_main.clamp(min=tiny), "grad_cosine": cosine}
