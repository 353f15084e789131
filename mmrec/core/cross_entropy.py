"""The language-modelling loss without the logits of a whole batch.

On a GPU the gradients are computed with the loss, a chunk of tokens at a time: logits by one product, loss and `softmax − one-hot` by a
kernel in their place, and from these the two products of the gradients. Nothing is computed twice, and nothing waits for the device
(liger-kernel's form of the same, 0.8.5, reads the count of labels and the incoming gradient back to the host in every step).
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrec.core.chunks import sum_over_chunks
from mmrec.ops.common import state_dtype
from mmrec.ops.registration import register, register_backward, runs_kernel
from mmrec.ops.wide_product import wide_product

IGNORED_LABEL = -1


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `softmax(hidden · weightᵀ)`, `chunk_size` tokens' logits at a time.

    On a GPU the products run in autocast's dtype where it is on; the sums are fp32, and so is the sum of the weight's gradient over
    chunks. On a CPU, and in float64, it is `linear_cross_entropy_naive`.

    Args:
        hidden_ND: (N, D), the last hidden states.
        weight_VD: (V, D), the output head.
        labels_N: (N,) int64; −1 where nothing is to be learned. Other labels outside 0 … V − 1 make the loss NaN on a GPU.
        chunk_size: tokens whose (chunk, V) logits may exist at once.

    Returns:
        The mean loss over labels other than −1 (0-dim fp32; 0 where there is none), and how many there are (0-dim int64).
    """
    if not runs_kernel(hidden_ND, state_dtype(hidden_ND, weight_VD)):
        return linear_cross_entropy_naive(hidden_ND, weight_VD, labels_N, chunk_size)
    device = hidden_ND.device.type
    operands = torch.promote_types(hidden_ND.dtype, weight_VD.dtype)
    if torch.is_autocast_enabled(device):
        operands = torch.get_autocast_dtype(device)
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden_ND, weight_VD)]
    total, _, _ = linear_cross_entropy_op(hidden_ND, weight_VD, labels_N, chunk_size, operands, *wanted)
    count = (labels_N != IGNORED_LABEL).sum()
    return total / count.clamp(min=1), count


def linear_cross_entropy_naive(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch; each chunk's logits are computed again in the backward."""
    total = sum_over_chunks(partial(_chunk_loss, weight_VD), hidden_ND, labels_N, size=chunk_size)
    count = (labels_N != IGNORED_LABEL).sum()
    return total / count.clamp(min=1), count


def _chunk_loss(weight_VD: Tensor, hidden_ND: Tensor, labels_N: Tensor) -> Tensor:
    logits = F.linear(hidden_ND, weight_VD)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, labels_N, ignore_index=IGNORED_LABEL, reduction="sum")


def _forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int, operands: torch.dtype, with_dhidden: bool, with_dweight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss (0-dim fp32) and its gradients: (N, D) in `operands`, (V, D) in the weight's dtype; (0,) where not wanted."""
    from mmrec.core.cross_entropy_kernels import launch_softmax  # Triton exists on Linux alone

    with torch.autocast(hidden.device.type, enabled=False):
        rows, head = hidden.to(operands).contiguous(), weight.to(operands)
        losses = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
        dhidden = torch.empty_like(rows) if with_dhidden else rows.new_empty(0)
        dweight: Tensor | None = None
        labels = labels.contiguous()
        for start in range(0, rows.shape[0], chunk_size):
            chunk = slice(start, start + chunk_size)
            logits = rows[chunk] @ head.t()
            launch_softmax(logits, labels[chunk], losses[chunk], IGNORED_LABEL, with_dhidden or with_dweight)
            if with_dhidden:
                torch.mm(logits, head, out=dhidden[chunk])
            if with_dweight:
                dweight = _add_product(dweight, logits.t(), rows[chunk])
            del logits  # before the next chunk's are made
        gradient = dweight.to(weight.dtype) if dweight is not None else weight.new_zeros(weight.shape if with_dweight else 0)
        return losses.sum(), dhidden, gradient


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """`total + a b` in fp32, in place; bf16 factors are summed and stored in fp32 by the product itself where the GPU can."""
    if total is None:
        return wide_product(a, b, torch.float32)
    if a.dtype == torch.float32 or not a.is_cuda:
        return total.addmm_(a.float(), b.float())
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def _fake(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int, operands: torch.dtype, with_dhidden: bool, with_dweight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dhidden = hidden.new_empty(hidden.shape if with_dhidden else 0, dtype=operands)
    return hidden.new_empty((), dtype=torch.float32), dhidden, weight.new_empty(weight.shape if with_dweight else 0)


linear_cross_entropy_op = register(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, int chunk_size, ScalarType operands, "
    "bool with_dhidden, bool with_dweight) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.hidden_dtype, ctx.wanted = inputs[0].dtype, inputs[5:]
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dtotal: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    dhidden, dweight = ctx.saved_tensors
    with_dhidden, with_dweight = ctx.wanted
    # A product each, out of place: whether dtotal is 1 is known on the device alone, and the graph may be kept for a second backward.
    return (
        (dhidden * dtotal).to(ctx.hidden_dtype) if with_dhidden and dtotal is not None else None,
        dweight * dtotal if with_dweight and dtotal is not None else None,
        *[None] * 5,
    )


register_backward(linear_cross_entropy_op, _autograd, _setup_context)
