"""`linear_scan` in PyTorch with its own backward: one fused multiply-add a step, everything else over all of time at once."""

from typing import Any

import torch
from torch import Tensor

from mmrec.ops.common import batch_first, previous_states, reset_time_first, scan_backward, scan_forward, state_dtype, time_first


def _prepare(x: Tensor, log_a: Tensor, h0: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Time-first decays (zero where a document starts), inputs and initial state in the state's dtype."""
    dtype = state_dtype(x, log_a, h0)
    a_TBD = time_first(log_a, dtype).exp()
    if reset is not None:
        a_TBD = a_TBD.masked_fill(reset_time_first(reset), 0)
    h0_BD = torch.zeros_like(a_TBD[0]) if h0 is None else h0.to(dtype)
    return a_TBD, time_first(x, dtype), h0_BD


@torch.library.custom_op("mmrec::linear_scan", mutates_args=())
def linear_scan_pytorch(x: Tensor, log_a: Tensor, h0: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """See the public function."""
    h_TBD = scan_forward(*_prepare(x, log_a, h0, reset))
    return batch_first(h_TBD, x.dtype), h_TBD[-1].clone()


@linear_scan_pytorch.register_fake
def _(x: Tensor, log_a: Tensor, h0: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, _, channels = x.shape
    return x.new_empty(x.shape), x.new_empty((batch, channels), dtype=state_dtype(x, log_a, h0))


@torch.library.custom_op("mmrec::linear_scan_backward", mutates_args=())
def linear_scan_backward_pytorch(
    dh: Tensor, dh_last: Tensor, x: Tensor, log_a: Tensor, h0: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to `x`, `log_a` and `h0`. The states are computed again: a bf16 output could not stand in for the fp32 state."""
    a_TBD, x_TBD, h0_BD = _prepare(x, log_a, h0, reset)
    previous_TBD = previous_states(scan_forward(a_TBD, x_TBD, h0_BD), h0_BD, None)
    g_TBD = scan_backward(a_TBD, time_first(dh, a_TBD.dtype), dh_last.to(a_TBD.dtype))
    dlog_a_TBD = g_TBD * a_TBD * previous_TBD
    return batch_first(g_TBD, x.dtype), batch_first(dlog_a_TBD, log_a.dtype), a_TBD[0] * g_TBD[0]


@linear_scan_backward_pytorch.register_fake
def _(dh: Tensor, dh_last: Tensor, x: Tensor, log_a: Tensor, h0: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, channels = x.shape
    return x.new_empty(x.shape), log_a.new_empty(log_a.shape), x.new_empty((batch, channels), dtype=state_dtype(x, log_a, h0))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dh: Tensor, dh_last: Tensor) -> tuple[Tensor | None, ...]:
    x, log_a, h0, reset = ctx.saved_tensors
    dx, dlog_a, dh0 = linear_scan_backward_pytorch(dh, dh_last, x, log_a, h0, reset)
    return dx, dlog_a, None if h0 is None else dh0.to(h0.dtype), None


linear_scan_pytorch.register_autograd(_backward, setup_context=_setup_context)
