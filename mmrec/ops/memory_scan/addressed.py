"""The backward of a memory that is read and written at addresses (`memory_address`, then `memory_scan`), as one operator of torch.

The gradients to the addresses are needed for nothing but the way on through their norms. Where one program holds a whole head they stay
in its registers; elsewhere they are tensors between two steps. The forward consists of `memory_address_scaled` and `memory_scan_kept`.
"""

import torch
from torch import Tensor

from mmrec.ops.common import state_dtype
from mmrec.ops.memory_address.pytorch import gradients_of_units
from mmrec.ops.memory_scan.pytorch import memory_scan_gradients
from mmrec.ops.registration import register, runs_kernel


def _backward_out(
    dr: Tensor,
    dM_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    M0: Tensor | None,
    reset: Tensor | None,
    scale: float,
    memories: Tensor | None,
    q_scale: Tensor,
    k_scale: Tensor,
    dh_more: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dlog_alpha: Tensor,
    dM0: Tensor,
    dh: Tensor,
) -> None:
    """Gradients into the caller's tensors, of any strides and dtypes.

    Args:
        dr, dM_last: cotangents of the memory's read-out and last state.
        q, k: (B, T, H, K), the addresses.
        v, log_alpha, M0, reset, scale: as of `memory_scan`.
        memories: from `memory_scan_kept`, or None.
        q_scale, k_scale: (B, T, H), from `memory_address_scaled`.
        dh_more: (B, T, H, K), the gradient that reaches the short-term state by other ways, or None.
        dq, dk, dh: (B, T, H, K), get the gradients to what `memory_address` was given.
        dv, dlog_alpha, dM0: get those of `memory_scan`.
    """
    if runs_kernel(q, state_dtype(q, k, v, log_alpha, M0)):
        from mmrec.ops.memory_address.kernels import launch_backward as launch_norms  # Triton exists on Linux alone
        from mmrec.ops.memory_scan.launchers import ADDRESSED, Addresses, launch_backward

        inputs = (dr, dM_last, q, k, v, log_alpha, M0, reset, scale)
        if max(k.shape[-1], v.shape[-1]) <= ADDRESSED:
            launch_backward(*inputs, dq, dk, dv, dlog_alpha, dM0, memories, Addresses(q_scale, k_scale, dh_more, dh))
            return
        dq_address, dk_address = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k))
        launch_backward(*inputs, dq_address, dk_address, dv, dlog_alpha, dM0, memories)
        launch_norms(dq_address, dk_address, q, k, None, dq, dk, dh, dh_more, q_scale, k_scale)
        return
    with torch.autocast(q.device.type, enabled=False):
        dq_address, dk_address, *values = memory_scan_gradients(dr, dM_last, q, k, v, log_alpha, M0, reset, scale)
        wide = dq_address.dtype
        *addresses, dh_own = gradients_of_units(dq_address, dk_address, q.to(wide), k.to(wide), q_scale, k_scale)
    dh_all = dh_own if dh_more is None else dh_own + dh_more
    for gradient, value in zip((dq, dk, dh, dv, dlog_alpha, dM0), (*addresses, dh_all, *values), strict=True):
        gradient.copy_(value)


addressed_memory_bwd_out = register(
    "addressed_memory_bwd_out(Tensor dr, Tensor? dM_last, Tensor q, Tensor k, Tensor v, Tensor log_alpha, Tensor? M0, Tensor? reset, "
    "float scale, Tensor? memories, Tensor q_scale, Tensor k_scale, Tensor? dh_more, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, "
    "Tensor(d!) dlog_alpha, Tensor(e!) dM0, Tensor(f!) dh) -> ()",
    _backward_out,
    lambda *arguments: None,
)
