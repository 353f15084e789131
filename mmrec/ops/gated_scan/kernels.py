"""Launchers of `gated_scan`'s kernels: which kernel, with which tiles, on which strides."""

import torch
import triton
from torch import Tensor

from mmrec.ops.gated_scan.kernels_backward import backward_kernel
from mmrec.ops.gated_scan.kernels_forward import sequential_kernel
from mmrec.ops.registration import INTERPRETED
from mmrec.ops.tuning import launch_options


def scan_class(batch: int, channels: int) -> str:
    """Shape class of the elementwise kernels: `few` where a thread for each channel fills less than two warps a multiprocessor."""
    return "few" if batch * channels <= 8192 else "many"


def launch_forward(
    z: Tensor, p: Tensor, log_gamma: Tensor, w_g: Tensor, h0: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`h` (B, T, D), contiguous in the dtype of `z`, and `h_last` (B, D) fp32."""
    batch, time, channels = z.shape
    h = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    h_last = torch.empty((batch, channels), dtype=torch.float32, device=z.device)
    options = launch_options("gated_scan.forward", scan_class(batch, channels), z.device)
    group = channels // p.shape[-1]
    sequential_kernel[(triton.cdiv(channels, options["BD"]), batch)](
        z,
        p,
        log_gamma,
        w_g,
        h0,
        reset,
        h,
        h_last,
        time,
        channels,
        group,
        *z.stride(),
        *p.stride(),
        *log_gamma.stride(),
        w_g.stride(0),
        *((0, 0) if h0 is None else h0.stride()),
        *((0, 0) if reset is None else reset.stride()),
        GROUPED=group > 1,
        HAS_H0=h0 is not None,
        HAS_RESET=reset is not None,
        INTERPRETED=INTERPRETED,
        **options,
    )
    return h, h_last


def launch_backward(
    dh: Tensor,
    dh_last: Tensor | None,
    h: Tensor,
    z: Tensor,
    p: Tensor,
    log_gamma: Tensor,
    w_g: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    dz: Tensor,
    dp: Tensor,
    dlog_gamma: Tensor,
    dw_g: Tensor,
    dh0: Tensor,
) -> None:
    """Write the gradients into the given tensors, of any strides; `dw_g` and a grouped `dp` are summed in two fixed stages."""
    batch, time, channels = z.shape
    options = launch_options("gated_scan.backward", scan_class(batch, channels), z.device)
    group = channels // p.shape[-1]
    # The kernel sums what lies in one stripe, which a power of two does; the rest is summed from fp32 partial sums.
    summed = min(group, options["BD"]) if group & (group - 1) == 0 else 1
    in_kernel = summed == group
    dp_parts = dp if in_kernel else torch.empty((batch, time, channels // summed), dtype=torch.float32, device=z.device)
    dw_g_parts = torch.empty((batch, channels), dtype=torch.float32, device=z.device)
    backward_kernel[(triton.cdiv(channels, options["BD"]), batch)](
        dh,
        dh_last,
        h,
        z,
        p,
        log_gamma,
        w_g,
        h0,
        reset,
        dz,
        dp_parts,
        dlog_gamma,
        dw_g_parts,
        dh0,
        time,
        channels,
        group,
        *dh.stride(),
        *h.stride(),
        *z.stride(),
        *p.stride(),
        *log_gamma.stride(),
        w_g.stride(0),
        *((0, 0) if dh_last is None else dh_last.stride()),
        *((0, 0) if h0 is None else h0.stride()),
        *((0, 0) if reset is None else reset.stride()),
        *dz.stride(),
        *dp_parts.stride(),
        *dlog_gamma.stride(),
        *dh0.stride(),
        SUMMED=summed,
        HAS_DH_LAST=dh_last is not None,
        HAS_H0=h0 is not None,
        HAS_RESET=reset is not None,
        INTERPRETED=INTERPRETED,
        **options,
    )
    if not in_kernel:
        dp.copy_(dp_parts.unflatten(-1, (p.shape[-1], -1)).sum(-1))
    dw_g.copy_(dw_g_parts.sum(0))
