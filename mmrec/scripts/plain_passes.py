"""The block's element-wise passes in plain eager PyTorch: what a user would write, for comparison with the fused ones.

Not the operators' truths throughout: those widen to fp32 where eager code would not, and would make the comparison too easy.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch.nn.functional as F
from torch import Tensor

from mmrec.blocks import mm_rec_block, swiglu
from mmrec.core import mdi
from mmrec.ops.decay_log import decay_log_naive
from mmrec.ops.gated_read_out import gated_read_out_naive
from mmrec.ops.memory_address import l2norm


def _decay_log(
    logits: Tensor, bias: Tensor, context: Tensor | None = None, context_bias: Tensor | None = None, *, low: float, high: float
) -> Tensor:
    return decay_log_naive(logits, bias, context, context_bias, low, high)


def _memory_address(q: Tensor, k: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    return l2norm(q + h).to(q.dtype), l2norm(k + h).to(k.dtype)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@contextmanager
def plain_passes() -> Iterator[None]:
    """Within it a block runs its passes as PyTorch formulas, one kernel an operation; the recurrences stay what they are."""
    plain: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
        (mdi, "decay_log", _decay_log),
        (mm_rec_block, "memory_address", _memory_address),
        (mm_rec_block, "gated_read_out", gated_read_out_naive),
        (swiglu, "swiglu", _swiglu),
    )
    with ExitStack() as stack:
        for module, name, function in plain:
            stack.enter_context(patch.object(module, name, function))
        yield


def with_plain_passes(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as it runs within `plain_passes`."""

    def plain() -> Any:
        with plain_passes():
            return call()

    return plain
