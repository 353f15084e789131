"""`gated_scan` in PyTorch (derived in README.md): loops only where the recurrence itself is sequential."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmrec.ops.common import batch_first, previous_states, reset_time_first, scan_backward, state_dtype, time_first


class _Terms(NamedTuple):
    """Time-first inputs in the state's dtype."""

    write_TBD: Tensor  # 1 − γ
    z_TBD: Tensor
    gamma_TBD: Tensor
    gate_bias_TBD: Tensor  # p̄
    w_g_D: Tensor
    h0_BD: Tensor
    reset_TB1: Tensor | None


def _prepare(z: Tensor, p: Tensor, log_gamma: Tensor, w_g: Tensor, h0: Tensor | None, reset: Tensor | None) -> _Terms:
    dtype = state_dtype(z, p, log_gamma, w_g, h0)
    log_gamma_TBD = time_first(log_gamma, dtype)
    gate_bias_TBD = time_first(p, dtype).repeat_interleave(z.shape[-1] // p.shape[-1], dim=-1)
    h0_BD = torch.zeros_like(log_gamma_TBD[0]) if h0 is None else h0.to(dtype)
    # expm1 and not 1 − exp: at a time constant of 2048 the difference of two numbers near 1 keeps four digits.
    write_TBD = -torch.expm1(log_gamma_TBD)
    reset_TB1 = None if reset is None else reset_time_first(reset)
    return _Terms(write_TBD, time_first(z, dtype), log_gamma_TBD.exp(), gate_bias_TBD, w_g.to(dtype), h0_BD, reset_TB1)


def gated_scan_forward(
    z: Tensor, p: Tensor, log_gamma: Tensor, w_g: Tensor, h0: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`h` (B, T, D) and `h_last` (B, D); see the public function."""
    terms = _prepare(z, p, log_gamma, w_g, h0, reset)
    write_TBD = terms.write_TBD * terms.z_TBD
    h_TBD = torch.empty_like(write_TBD)
    gate = torch.empty_like(terms.h0_BD)
    previous = terms.h0_BD
    for t in range(write_TBD.shape[0]):
        if terms.reset_TB1 is not None:
            previous = previous.masked_fill(terms.reset_TB1[t], 0)
        torch.addcmul(terms.gate_bias_TBD[t], terms.w_g_D, previous, out=gate).sigmoid_().mul_(write_TBD[t])
        previous = torch.addcmul(gate, terms.gamma_TBD[t], previous, out=h_TBD[t])
    return batch_first(h_TBD, z.dtype), h_TBD[-1].clone()


def gated_scan_gradients(
    dh: Tensor,
    dh_last: Tensor | None,
    h: Tensor,
    z: Tensor,
    p: Tensor,
    log_gamma: Tensor,
    w_g: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to `z`, `p`, `log_gamma`, `w_g` and `h0` from the forward's output `h`, in the state's dtype."""
    terms = _prepare(z, p, log_gamma, w_g, h0, reset)
    dtype = terms.write_TBD.dtype
    previous_TBD = previous_states(time_first(h, dtype), terms.h0_BD, terms.reset_TB1)
    gate_TBD = torch.sigmoid(terms.w_g_D * previous_TBD + terms.gate_bias_TBD)
    slope_TBD = terms.write_TBD * terms.z_TBD * gate_TBD * (1 - gate_TBD)
    jacobian_TBD = terms.gamma_TBD + terms.w_g_D * slope_TBD
    if terms.reset_TB1 is not None:
        jacobian_TBD = jacobian_TBD.masked_fill(terms.reset_TB1, 0)

    dh_last_BD = torch.zeros_like(terms.h0_BD) if dh_last is None else dh_last.to(dtype)
    g_TBD = scan_backward(jacobian_TBD, time_first(dh, dtype), dh_last_BD)
    dz_TBD = g_TBD * gate_TBD * terms.write_TBD
    dlog_gamma_TBD = g_TBD * terms.gamma_TBD * (previous_TBD - terms.z_TBD * gate_TBD)
    dpre_TBD = g_TBD * slope_TBD
    dp_TBP = dpre_TBD.unflatten(-1, (p.shape[-1], -1)).sum(-1)
    dw_g_D = (dpre_TBD * previous_TBD).sum((0, 1))
    gradients = (batch_first(dz_TBD, dtype), batch_first(dp_TBP, dtype), batch_first(dlog_gamma_TBD, dtype))
    return *gradients, dw_g_D, jacobian_TBD[0] * g_TBD[0]
