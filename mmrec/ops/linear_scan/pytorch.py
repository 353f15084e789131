"""`linear_scan` in PyTorch: one fused multiply-add a step, everything else over all of time at once."""

import torch
from torch import Tensor

from mmrec.ops.common import batch_first, previous_states, reset_time_first, scan_backward, scan_forward, state_dtype, time_first


def _decays(log_a: Tensor, reset: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Time-first decays, zero where a document starts."""
    a_TBD = time_first(log_a, dtype).exp()
    return a_TBD if reset is None else a_TBD.masked_fill(reset_time_first(reset), 0)


def linear_scan_forward(x: Tensor, log_a: Tensor, h0: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """`h` (B, T, D) and `h_last` (B, D); see the public function."""
    dtype = state_dtype(x, log_a, h0)
    a_TBD = _decays(log_a, reset, dtype)
    h0_BD = torch.zeros_like(a_TBD[0]) if h0 is None else h0.to(dtype)
    h_TBD = scan_forward(a_TBD, time_first(x, dtype), h0_BD)
    return batch_first(h_TBD, x.dtype), h_TBD[-1].clone()


def linear_scan_gradients(
    dh: Tensor, dh_last: Tensor | None, h: Tensor, log_a: Tensor, h0: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to `x`, `log_a` and `h0` from the forward's output `h`, in the state's dtype, all (…, D)."""
    dtype = state_dtype(dh, log_a, h0)
    a_TBD = _decays(log_a, reset, dtype)
    h0_BD = torch.zeros_like(a_TBD[0]) if h0 is None else h0.to(dtype)
    dh_last_BD = torch.zeros_like(h0_BD) if dh_last is None else dh_last.to(dtype)
    g_TBD = scan_backward(a_TBD, time_first(dh, dtype), dh_last_BD)
    dlog_a_TBD = g_TBD * a_TBD * previous_states(time_first(h, dtype), h0_BD, None)
    return batch_first(g_TBD, dtype), batch_first(dlog_a_TBD, dtype), a_TBD[0] * g_TBD[0]
