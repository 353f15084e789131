"""Launchers of `gated_scan`'s kernels: which kernel, with which tiles, on which strides."""

from typing import Any

import torch
from torch import Tensor

from mmrec.ops.gated_scan.kernels_backward import backward_kernel
from mmrec.ops.gated_scan.kernels_forward import sequential_kernel
from mmrec.ops.gated_scan.kernels_newton import newton_kernel
from mmrec.ops.launching import Call, blocks, check_row_strides, launch, strides
from mmrec.ops.registration import INTERPRETED
from mmrec.ops.segments import count, cut
from mmrec.ops.sums import add_parts
from mmrec.ops.tuning import channel_class, launch_options

# Channels of all sequences that fill a GPU, and segments below which the backward of a long sequence is not cut: its maps read 12 of the 20
# bytes once more that it moves.
CHANNELS, WORTH = 16384, 16


def launch_forward(z: Tensor, p: Tensor, log_gamma: Tensor, w_g: Tensor, h0: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """`h` (B, T, D), contiguous in the dtype of `z`, and `h_last` (B, D) fp32."""
    batch, time, channels = z.shape
    choice = launch_options("gated_scan.newton", "choice", z.device)
    if time >= choice["min_time"] and batch * channels <= choice["max_channels"]:
        h, h_last, _ = newton_scan(z, p, log_gamma, w_g, h0, reset)
        return h, h_last
    h, h_last = _outputs(z)

    def prepare() -> Call:
        options = launch_options("gated_scan.forward", channel_class(batch, channels), z.device)
        check_row_strides("gated_scan", 1 << options["LEVELS"], z, p, log_gamma)
        numbers, flags = _forward_arguments(z, p, log_gamma, w_g, h0, reset)
        grouped = {"GROUPED": p.shape[-1] < channels}
        return Call((batch * blocks(channels, options["BD"]),), numbers, flags | grouped | options)

    launch(sequential_kernel, (z, p, log_gamma, w_g, h0, reset, h, h_last), prepare)
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
    grid = (batch * blocks(channels, options["BD"]),)
    counts = torch.empty((grid[0], 2), dtype=torch.int32, device=z.device)

    def prepare() -> Call:
        check_row_strides("gated_scan", options["R"] * options["G"], z, p, log_gamma)
        numbers, flags = _forward_arguments(z, p, log_gamma, w_g, h0, reset)
        return Call(grid, numbers, flags | options)

    launch(newton_kernel, (z, p, log_gamma, w_g, h0, reset, h, h_last, counts), prepare)
    return h, h_last, counts


def _outputs(z: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    return h, torch.empty((z.shape[0], z.shape[2]), dtype=torch.float32, device=z.device)


def _forward_arguments(
    z: Tensor, p: Tensor, log_gamma: Tensor, w_g: Tensor, h0: Tensor | None, reset: Tensor | None
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """What both forward kernels take beside their tensors: sizes and strides, flags."""
    group = z.shape[2] // p.shape[-1]
    numbers = (z.shape[1], z.shape[2], group, *z.stride(), *p.stride(), *log_gamma.stride(), w_g.stride(0))
    flags = {"HAS_H0": h0 is not None, "HAS_RESET": reset is not None, "INTERPRETED": INTERPRETED}
    return (*numbers, *strides(h0, 2), *strides(reset, 2)), flags


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
    group = channels // p.shape[-1]
    segments = count(time, batch * channels, CHANNELS, WORTH, (dh, h, z, p, log_gamma, dz, dp, dlog_gamma, reset))
    # The kernel sums what lies in one stripe, which a power of two does; the rest is summed from fp32 partial sums.
    options = launch_options("gated_scan.backward", channel_class(batch * segments, channels), z.device)
    summed = min(group, options["BD"]) if group & (group - 1) == 0 else 1
    in_kernel = summed == group
    dp_parts = dp if in_kernel else torch.empty((batch, time, channels // summed), dtype=torch.float32, device=z.device)
    long = (dh, h, z, p, log_gamma, dz, dp_parts, dlog_gamma)
    states = (dh_last, h0, dh0)
    if segments > 1:
        before = states_before(h, h0, segments)
        long = tuple(cut(tensor, segments) for tensor in long)
        reset = None if reset is None else cut(reset, segments)
        offsets, products = (torch.empty(before.shape, dtype=torch.float32, device=z.device) for _ in range(2))
        _backward(long, w_g, reset, (None, before, offsets), products, products, group, summed)
        after = chained(offsets, products, dh_last, dh0, segments)
        states = (after, before, torch.empty_like(before))
    dw_g_parts = torch.empty((batch * segments, channels), dtype=torch.float32, device=z.device)
    _backward(long, w_g, reset, states, dw_g_parts, None, group, summed)
    if not in_kernel:
        dp.copy_(dp_parts.unflatten(-1, (p.shape[-1], -1)).sum(-1))
    add_parts(dw_g_parts, dw_g)


def _backward(
    long: tuple[Tensor, ...],
    w_g: Tensor,
    reset: Tensor | None,
    states: tuple[Tensor | None, Tensor | None, Tensor],
    dw_g_parts: Tensor,
    products: Tensor | None,
    group: int,
    summed: int,
) -> None:
    """One launch; with `products` only the map from the adjoint behind the last token to the one before the first."""
    dh, h, z, p, log_gamma, dz, dp_parts, dlog_gamma = long
    dh_last, h0, dh0 = states
    batch, time, channels = z.shape
    options = launch_options("gated_scan.backward", channel_class(batch, channels), z.device)

    def prepare() -> Call:
        check_row_strides("gated_scan", options["R"] * options["G"], *long)
        inputs = (*dh.stride(), *h.stride(), *z.stride(), *p.stride(), *log_gamma.stride(), w_g.stride(0))
        carried = (*strides(dh_last, 2), *strides(h0, 2), *strides(reset, 2))
        outputs = (*dz.stride(), *dp_parts.stride(), *dlog_gamma.stride(), *dh0.stride())
        flags = {
            "SUMMED": summed,
            "HAS_DH_LAST": dh_last is not None,
            "HAS_H0": h0 is not None,
            "HAS_RESET": reset is not None,
            "SUMMARY": products is not None,
            "INTERPRETED": INTERPRETED,
        }
        return Call((batch * blocks(channels, options["BD"]),), (time, channels, group, *inputs, *carried, *outputs), flags | options)

    launch(
        backward_kernel,
        (dh, dh_last, h, z, p, log_gamma, w_g, h0, reset, dz, dp_parts, dlog_gamma, dw_g_parts, dh0, products),
        prepare,
        summed,
    )


def states_before(h: Tensor, h0: Tensor | None, segments: int) -> Tensor:
    """The state that enters each segment, (B · S, D) fp32: as the whole sequence's backward would read it, from `h`."""
    last = h[:, h.shape[1] // segments - 1 :: h.shape[1] // segments].float()
    first = torch.zeros_like(last[:, :1]) if h0 is None else h0.float().unsqueeze(1)
    return torch.cat([first, last[:, :-1]], dim=1).flatten(0, 1)


def chained(offsets: Tensor, products: Tensor, dh_last: Tensor | None, dh0: Tensor, segments: int) -> Tensor:
    """The adjoint behind each segment's last token, (B · S, D) fp32: each segment's map applied to what the next one hands it.

    Args:
        offsets, products: (B · S, D) fp32, of the maps `f → product f + offset`.
        dh_last: (B, D), behind the sequence; None: nothing.
        dh0: (B, D), gets what arrives before the first token.
    """
    offset, product = offsets.unflatten(0, (-1, segments)), products.unflatten(0, (-1, segments))
    after = torch.empty_like(offset)
    adjoint = torch.zeros_like(offset[:, 0]) if dh_last is None else dh_last.float()
    for segment in reversed(range(segments)):
        after[:, segment] = adjoint
        adjoint = torch.addcmul(offset[:, segment], product[:, segment], adjoint)
    dh0.copy_(adjoint)
    return after.flatten(0, 1)
