"""Triton kernel of the loss: a program takes one token's logits, and leaves their gradient where they were."""

import triton
import triton.language as tl
from torch import Tensor

from mmrec.ops.launching import Call, launch, power_of_two
from mmrec.ops.primitives import LOG2E

BLOCK = 8192  # logits in registers at a time; the second pass over a row finds it in the cache


@triton.jit
def softmax_kernel(
    logits_ptr,
    labels_ptr,
    losses_ptr,
    V,
    logits_stride,
    IGNORED: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    BV: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + token * logits_stride
    label = tl.load(labels_ptr + token)
    column = tl.arange(0, BV)
    if label == IGNORED:
        tl.store(losses_ptr + token, 0.0)
        if WITH_GRADIENT:
            for first in range(0, V, BV):
                tl.store(row_ptr + first + column, tl.zeros([BV], row_ptr.dtype.element_ty), mask=first + column < V)
    else:
        # Before anything is overwritten. A label outside the vocabulary makes the loss NaN, which the training notices.
        target = tl.load(row_ptr + label, mask=(label >= 0) & (label < V), other=float("nan")).to(tl.float32)
        maximum = float("-inf")
        total = 0.0
        for first in range(0, V, BV):
            x = tl.load(row_ptr + first + column, mask=first + column < V, other=float("-inf")).to(tl.float32)
            larger = tl.maximum(maximum, tl.max(x, axis=0))
            total = total * tl.exp2((maximum - larger) * LOG2E) + tl.sum(tl.exp2((x - larger) * LOG2E), axis=0)
            maximum = larger
        tl.store(losses_ptr + token, maximum - target + tl.log(total))
        if WITH_GRADIENT:
            scale = 1.0 / total
            for first in range(0, V, BV):
                x = tl.load(row_ptr + first + column, mask=first + column < V, other=float("-inf")).to(tl.float32)
                gradient = tl.exp2((x - maximum) * LOG2E) * scale - tl.where(first + column == label, 1.0, 0.0)
                tl.store(row_ptr + first + column, gradient.to(row_ptr.dtype.element_ty), mask=first + column < V)


def launch_softmax(logits: Tensor, labels: Tensor, losses: Tensor, ignored: int, with_gradient: bool) -> None:
    """Write each token's loss and, in place of its logits, `softmax − one-hot`.

    Args:
        logits: (N, V), contiguous, any float dtype; overwritten where `with_gradient`.
        labels: (N,) int64, contiguous.
        losses: (N,) fp32, contiguous; 0 where the label is `ignored`.
        ignored: the label that does not count.
        with_gradient: whether the gradient is wanted.
    """
    block = min(BLOCK, power_of_two(logits.shape[1]))

    def prepare() -> Call:
        named = {"IGNORED": ignored, "WITH_GRADIENT": with_gradient, "BV": block, "num_warps": 8 if block > 1024 else 4}
        return Call((logits.shape[0],), (logits.shape[1], logits.stride(0)), named)

    launch(softmax_kernel, (logits, labels, losses), prepare, ignored, with_gradient, block)
