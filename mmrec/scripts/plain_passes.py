"""The block's element-wise passes in plain eager PyTorch: what a user would write, for comparison with the fused ones.

Not the operators' truths throughout: those widen to fp32 where eager code would not, and would make the comparison too easy.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch.nn.functional as F
from torch import Tensor, nn

from mmrec.blocks import composition, hem, mm_rec_block, residual, swiglu
from mmrec.blocks.mm_rec_block import MMRecBlock
from mmrec.core import decay, mdi, uboo
from mmrec.ops.decay_log import decay_log_naive
from mmrec.ops.gated_read_out import gated_read_out_naive
from mmrec.ops.head_decay import head_decay_naive
from mmrec.ops.memory_address import l2norm
from mmrec.ops.planning_error import planning_error_naive
from mmrec.ops.rms_norm import Branch
from mmrec.ops.short_convolution import last_tokens


def _decay_log(
    logits: Tensor, bias: Tensor, context: Tensor | None = None, context_bias: Tensor | None = None, *, low: float, high: float
) -> Tensor:
    return decay_log_naive(logits, bias, context, context_bias, low, high)


def _memory_address(q: Tensor, k: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    return l2norm(q + h).to(q.dtype), l2norm(k + h).to(k.dtype)


def _short_convolution(x: Tensor, weight: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    assert state is None  # what is timed is one document from its first token
    assert reset is None
    channels, taps = weight.shape
    behind = F.pad(x.mT, (taps - 1, 0))
    return F.conv1d(behind, weight.to(x.dtype).unsqueeze(1), groups=channels).mT, last_tokens([x], taps, None, None)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _rms_norm_branch(x: Tensor, weight: Tensor, eps: float, overwritten: bool) -> Branch:
    normed = _rms_norm(x, weight, eps)
    return Branch(normed, normed, x, owned=False)


def _apply_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    result: Tensor = linear(x)
    return result


def _add_linear(stream: Tensor, x: Tensor, linear: nn.Linear, owned: bool) -> Tensor:
    return stream + linear(x)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@contextmanager
def plain_passes() -> Iterator[None]:
    """Within it a block runs its passes as PyTorch formulas, one kernel an operation; recurrences and a window's attention stay."""
    plain: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
        (mdi, "decay_log", _decay_log),
        (MMRecBlock, "_mixed", MMRecBlock._composed),
        (composition, "memory_address", _memory_address),
        (composition, "short_convolution", _short_convolution),
        (composition, "gated_read_out", gated_read_out_naive),
        (decay, "head_decay", head_decay_naive),
        (residual, "rms_norm", _rms_norm),
        (residual, "rms_norm_branch", _rms_norm_branch),
        (mm_rec_block, "add_linear", _add_linear),
        (swiglu, "add_linear", _add_linear),
        (swiglu, "apply_linear", _apply_linear),
        (hem, "apply_linear", _apply_linear),
        (swiglu, "is_plain", lambda linear: False),  # nothing is recomputed in a function of its own
        (uboo, "planning_error", planning_error_naive),
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
