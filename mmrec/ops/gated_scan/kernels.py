"""Launchers of `gated_scan`'s kernels: which kernel, with which tiles, on which strides."""

from typing import Any

import torch
import triton
from torch import Tensor

from mmrec.ops.gated_scan.kernels_backward import backward_kernel
from mmrec.ops.gated_scan.kernels_forward import sequential_kernel
from mmrec.ops.gated_scan.kernels_newton import newton_kernel
from mmrec.ops.registration import INTERPRETED
from mmrec.ops.tuning import launch_options


def scan_class(batch: int, channels: int) -> str:
    """Shape class of the elementwise kernels: `few` where a thread for each channel fills less than two warps a multiprocessor."""
    return "few" if batch * channels <= 8192 else "many"


def launch_forward(z: Tensor, p: Tensor, log_gamma: Tensor, w_g: Tensor, h0: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """`h` (B, T, D), contiguous in the dtype of `z`, and `h_last` (B, D) fp32."""
    batch, time, channels = z.shape
    choice = launch_options("gated_scan.newton", "choice", z.device)
    if time >= choice["min_time"] and batch * channels <= choice["max_channels"]:
        h, h_last, _ = newton_scan(z, p, log_gamma, w_g, h0, reset)
        return h, h_last
    h, h_last = _outputs(z)
    options = launch_options("gated_scan.forward", scan_class(batch, channels), z.device)
    grid = (triton.cdiv(channels, options["BD"]), batch)
    tensors, numbers, flags = _forward_arguments(z, p, log_gamma, w_g, h0, reset)
    sequential_kernel[grid](*tensors, h, h_last, *numbers, **flags, **options)
    return h, h_last


def newton_scan(
    z: Tensor, p: Tensor, log_gamma: Tensor, w_g: Tensor, h0: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The time-parallel forward, whatever the shape.

    Returns:
        `h`, `h_last`, and how it went: int32 (programs, 2), the tiles a program had to run token by token and the Newton iterations of
        all its tiles.
    """
    batch, _, channels = z.shape
    h, h_last = _outputs(z)
    options = launch_options("gated_scan.newton", "few", z.device)
    grid = (triton.cdiv(channels, options["BD"]), batch)
    counts = torch.empty((grid[0] * grid[1], 2), dtype=torch.int32, device=z.device)
    tensors, numbers, flags = _forward_arguments(z, p, log_gamma, w_g, h0, reset)
    newton_kernel[grid](*tensors, h, h_last, counts, *numbers, **flags, **options)
    return h, h_last, counts


def _outputs(z: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    return h, torch.empty((z.shape[0], z.shape[2]), dtype=torch.float32, device=z.device)


def _forward_arguments(
    z: Tensor, p: Tensor, log_gamma: Tensor, w_g: Tensor, h0: Tensor | None, reset: Tensor | None
) -> tuple[tuple[Any, ...], tuple[int, ...], dict[str, bool]]:
    """What both forward kernels take: tensors, sizes and strides, flags."""
    group = z.shape[2] // p.shape[-1]
    numbers = (
        z.shape[1],
        z.shape[2],
        group,
        *z.stride(),
        *p.stride(),
        *log_gamma.stride(),
        w_g.stride(0),
        *((0, 0) if h0 is None else h0.stride()),
        *((0, 0) if reset is None else reset.stride()),
    )
    flags = {"GROUPED": group > 1, "HAS_H0": h0 is not None, "HAS_RESET": reset is not None, "INTERPRETED": INTERPRETED}
    return (z, p, log_gamma, w_g, h0, reset), numbers, flags


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
