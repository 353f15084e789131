"""Launchers of `gated_scan`'s kernels: which kernel, with which tiles, on which strides; with γ from its log or from logits."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmrec.ops.gated_scan.kernels_adjoint_map import adjoint_map_kernel
from mmrec.ops.gated_scan.kernels_backward import backward_kernel
from mmrec.ops.gated_scan.kernels_chain import chain_kernel
from mmrec.ops.gated_scan.kernels_forward import sequential_kernel
from mmrec.ops.gated_scan.kernels_newton import newton_kernel
from mmrec.ops.launching import Call, blocks, check_row_strides, launch, strides
from mmrec.ops.registration import INTERPRETED
from mmrec.ops.segments import count, cut
from mmrec.ops.sums import add_parts
from mmrec.ops.tuning import channel_class, launch_options

# Channels of all sequences that fill a GPU, and segments below which a long sequence is not cut: its inputs are read once or twice more.
CHANNELS, WORTH = 24576, 16
# Of a state between segments, relative to the channel's largest. In fp32 rounding leaves some 1e-6 after thousands of tokens; 5e-5 is a
# fortieth of what bf16 rounds stored states by, 2⁻⁹, and a fifth of fp16's 2⁻¹².
_TOLERANCE, _TOLERANCE_16_BITS = 4e-6, 5e-5
_CHAINED = 64  # channels of a program of `chain_kernel`


class Decay(NamedTuple):
    """What γ comes from, or the gradients to it: log-decays, or the logits of one or two gates with their biases.

    Attributes:
        values: (B, T, D), `log_gamma`, or the first gate's logits where there is a bias.
        bias, context_bias: (D,), of the logits.
        context: (B, T, D), the second gate's logits.
        low, high: bounds of log γ where it comes from logits.
    """

    values: Tensor
    bias: Tensor | None = None
    context: Tensor | None = None
    context_bias: Tensor | None = None
    low: float = 0.0
    high: float = 0.0

    def bounds(self) -> tuple[float, float, float, float]:
        """Of γ and of 1 − γ, as the kernels take them."""
        return math.exp(self.low), math.exp(self.high), -math.expm1(self.high), -math.expm1(self.low)

    def flags(self) -> dict[str, bool]:
        """The kernels' constants."""
        return {"LOGITS": self.bias is not None, "HAS_CONTEXT": self.context is not None}

    def row(self, direction: str) -> str:
        """Of the table of options, for `forward` or `backward`. Logits move more tensors and take registers: other tiles suit them."""
        return f"gated_scan.{direction}" if self.bias is None else f"gated_scan.{direction}_from_logits"

    def in_segments(self, segments: int) -> "Decay":
        """Of sequences cut in time."""
        return self._replace(values=cut(self.values, segments), context=None if self.context is None else cut(self.context, segments))


def launch_forward(z: Tensor, p: Tensor, log_gamma: Tensor, w_g: Tensor, h0: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """`h` (B, T, D), contiguous in the dtype of `z`, and `h_last` (B, D) fp32."""
    return fastest_scan(z, p, Decay(log_gamma), w_g, h0, reset, lambda: log_gamma)


def fastest_scan(
    z: Tensor,
    p: Tensor,
    decay: Decay,
    w_g: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    log_gamma: Callable[[], Tensor],
) -> tuple[Tensor, Tensor]:
    """`launch_forward` with any kind of decay, in the form that suits the shape; `log_gamma` gives what Newton's method over time takes."""
    segments = forward_segments(z, p, decay, reset)
    if segments > 1:
        return segmented_scan(z, p, decay, w_g, h0, reset, segments)
    if newton_is_faster(z):
        h, h_last, _ = newton_scan(z, p, log_gamma(), w_g, h0, reset)
        return h, h_last
    return sequential_scan(z, p, decay, w_g, h0, reset)


def forward_segments(z: Tensor, p: Tensor, decay: Decay, reset: Tensor | None) -> int:
    """Into how many segments the forward of long sequences of few channels is cut; 1: it is not."""
    batch, time, channels = z.shape
    filling = launch_options("gated_scan.forward_segments", "choice", z.device)["channels"]
    return count(time, batch * channels, filling, WORTH, (z, p, decay.values, decay.context, reset))


def newton_is_faster(z: Tensor) -> bool:
    """Whether sequences are so long and channels so few that a loop over time would leave the machine idle."""
    batch, time, channels = z.shape
    choice = launch_options("gated_scan.newton", "choice", z.device)
    return bool(time >= choice["min_time"] and batch * channels <= choice["max_channels"])


def sequential_scan(z: Tensor, p: Tensor, decay: Decay, w_g: Tensor, h0: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """The forward as a loop over time, whatever the shape."""
    h, h_last = _outputs(z)
    _sequential(z, p, decay, w_g, h0, reset, h, h_last)
    return h, h_last


def segmented_scan(
    z: Tensor, p: Tensor, decay: Decay, w_g: Tensor, h0: Tensor | None, reset: Tensor | None, segments: int
) -> tuple[Tensor, Tensor]:
    """The forward as loops over segments side by side, for long sequences of few channels: Newton's method for the states between them.

    A first pass from zeros gives what each segment leaves and how that changes with what it starts from, both exact for `w_g` of zero; the
    states that follow are those of the second pass, which writes `h`. Channels whose states are still off are run once more, and at last
    in one piece. That is decided on the device: what is not needed ends at once.
    """
    batch, _, channels = z.shape
    h, h_last = _outputs(z)
    tolerance = _TOLERANCE if z.element_size() > 2 else _TOLERANCE_16_BITS
    used = torch.zeros((batch, segments, channels), dtype=torch.float32, device=z.device)
    if h0 is not None:
        used[:, 0] = h0
    left, product, starts = (torch.empty_like(used) for _ in range(3))
    wanted = torch.empty((batch, channels), dtype=torch.int32, device=z.device)
    long = (cut(z, segments), cut(p, segments), decay.in_segments(segments), w_g)
    new = None if reset is None else cut(reset, segments)
    for index, states in enumerate((None, cut(h, segments), cut(h, segments))):
        needed = wanted if index == 2 else None
        _sequential(*long, used.flatten(0, 1), new, states, left.flatten(0, 1), product.flatten(0, 1), needed, segments)
        _chain(left, product, used, h0, starts, h_last, wanted, tolerance, every=index < 2)
        used, starts = starts, used
    _sequential(z, p, decay, w_g, h0, reset, h, h_last, None, wanted)
    return h, h_last


def _chain(
    left: Tensor,
    product: Tensor,
    used: Tensor | None,
    first: Tensor | None,
    starts: Tensor,
    last: Tensor,
    wanted: Tensor | None,
    tolerance: float = 0.0,
    every: bool = True,
    reverse: bool = False,
) -> None:
    """See `chain_kernel`."""

    def prepare() -> Call:
        batch, segments, channels = left.shape
        numbers = (segments, channels, *strides(first, 2), *last.stride())
        named = {"ALL": every, "REVERSE": reverse, "TOLERANCE": tolerance, "BD": _CHAINED, "num_warps": 1}
        return Call((batch * blocks(channels, _CHAINED),), numbers, named)

    launch(chain_kernel, (left, product, used, first, starts, last, wanted), prepare, tolerance, every, reverse)


def _sequential(
    z: Tensor,
    p: Tensor,
    decay: Decay,
    w_g: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    h: Tensor | None,
    h_last: Tensor,
    product: Tensor | None = None,
    wanted: Tensor | None = None,
    segments: int = 1,
) -> None:
    """One launch of `sequential_kernel` into `h`, `h_last` and `product`; `wanted`: of sequences of `segments` each."""

    def prepare() -> Call:
        batch, _, channels = z.shape
        options = launch_options(decay.row("forward"), channel_class(batch, channels), z.device)
        _check_rows(1 << options["LEVELS"], z, p, decay.values, decay.context)
        numbers, flags = _forward_arguments(z, p, decay.values, w_g, h0, reset)
        of_gates = (*_gate_strides(decay), *decay.bounds())
        named = flags | decay.flags() | {"GROUPED": p.shape[-1] < channels} | options
        return Call((batch * blocks(channels, options["BD"]),), (*numbers, *of_gates, segments), named)

    tensors = (z, p, decay.values, w_g, h0, reset, h, h_last, decay.bias, decay.context, decay.context_bias, product, wanted)
    launch(sequential_kernel, tensors, prepare, decay.low, decay.high, segments)


def _gate_strides(decay: Decay) -> tuple[int, ...]:
    return (*strides(decay.bias, 1), *strides(decay.context, 3), *strides(decay.context_bias, 1))


def _check_rows(rows: int, *tensors: Tensor | None) -> None:
    check_row_strides("gated_scan", rows, *(tensor for tensor in tensors if tensor is not None))


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
    adjoint_scan(dh, dh_last, h, z, p, Decay(log_gamma), w_g, h0, reset, dz, dp, Decay(dlog_gamma), dw_g, dh0)


def adjoint_scan(
    dh: Tensor,
    dh_last: Tensor | None,
    h: Tensor,
    z: Tensor,
    p: Tensor,
    decay: Decay,
    w_g: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    dz: Tensor,
    dp: Tensor,
    ddecay: Decay,
    dw_g: Tensor,
    dh0: Tensor,
) -> None:
    """`launch_backward` with any kind of decay; `ddecay` holds the gradients to what `decay` holds."""
    batch, time, channels = z.shape
    group = channels // p.shape[-1]
    whole = (dh, h, z, p, decay.values, decay.context, dz, dp, ddecay.values, ddecay.context, reset)
    segments = count(time, batch * channels, CHANNELS, WORTH, whole)
    # The kernel sums what lies in one stripe, which a power of two does; the rest is summed from fp32 partial sums.
    options = launch_options(decay.row("backward"), channel_class(batch * segments, channels), z.device)
    summed = min(group, options["BD"]) if group & (group - 1) == 0 else 1
    in_kernel = summed == group
    dp_parts = dp if in_kernel else torch.empty((batch, time, channels // summed), dtype=torch.float32, device=z.device)
    long = (dh, h, z, p, dz, dp_parts)
    states = (dh_last, h0, dh0)
    if segments > 1:
        before = states_before(h, h0, segments)
        long = (cut(dh, segments), cut(h, segments), cut(z, segments), cut(p, segments), cut(dz, segments), cut(dp_parts, segments))
        decay, ddecay = decay.in_segments(segments), ddecay.in_segments(segments)
        reset = None if reset is None else cut(reset, segments)
        offsets, products, after = (torch.empty((batch, segments, channels), dtype=torch.float32, device=z.device) for _ in range(3))
        _adjoint_maps(*long[:4], decay, w_g, before, reset, offsets, products, group)
        _chain(offsets, products, None, dh_last, after, dh0, None, reverse=True)  # each segment's map, applied to what the next hands it
        states = (after.flatten(0, 1), before, torch.empty_like(before))
    vectors = 1 + (decay.bias is not None) + (decay.context is not None)
    parts = torch.empty((vectors, batch * segments, channels), dtype=torch.float32, device=z.device)
    _backward(long, decay, ddecay, w_g, reset, states, parts, group, summed)
    if not in_kernel:
        dp.copy_(dp_parts.unflatten(-1, (p.shape[-1], -1)).sum(-1))
    add_parts(parts[0], dw_g)
    if ddecay.bias is not None:
        add_parts(parts[1] if ddecay.context_bias is None else parts[1:], ddecay.bias, ddecay.context_bias)


def _adjoint_maps(
    dh: Tensor,
    h: Tensor,
    z: Tensor,
    p: Tensor,
    decay: Decay,
    w_g: Tensor,
    before: Tensor,
    reset: Tensor | None,
    offsets: Tensor,
    products: Tensor,
    group: int,
) -> None:
    """See `adjoint_map_kernel`; its loop is the forward's, and so are its tiles."""

    def prepare() -> Call:
        batch, time, channels = z.shape
        options = launch_options(decay.row("forward"), channel_class(batch, channels), z.device)
        _check_rows(1 << options["LEVELS"], dh, h, z, p, decay.values, decay.context)
        inputs = (*dh.stride(), *h.stride(), *z.stride(), *p.stride(), *decay.values.stride(), w_g.stride(0), *strides(reset, 2))
        numbers = (time, channels, group, *inputs, *_gate_strides(decay), *decay.bounds())
        flags = {"HAS_RESET": reset is not None, "INTERPRETED": INTERPRETED}
        return Call((batch * blocks(channels, options["BD"]),), numbers, flags | decay.flags() | options)

    gates = (decay.bias, decay.context, decay.context_bias)
    launch(
        adjoint_map_kernel,
        (dh, h, z, p, decay.values, w_g, before, reset, *gates, offsets, products),
        prepare,
        decay.low,
        decay.high,
    )


def _backward(
    long: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    decay: Decay,
    ddecay: Decay,
    w_g: Tensor,
    reset: Tensor | None,
    states: tuple[Tensor | None, Tensor | None, Tensor],
    parts: Tensor,
    group: int,
    summed: int,
) -> None:
    """One launch of `backward_kernel`; `parts`: (1 to 3, B, D) fp32, of the gradients to `w_g` and to the gates' biases."""
    dh, h, z, p, dz, dp_parts = long
    dh_last, h0, dh0 = states
    batch, time, channels = z.shape
    options = launch_options(decay.row("backward"), channel_class(batch, channels), z.device)

    def prepare() -> Call:
        _check_rows(options["R"] * options["G"], *long, decay.values, decay.context, ddecay.values, ddecay.context)
        inputs = (*dh.stride(), *h.stride(), *z.stride(), *p.stride(), *decay.values.stride(), w_g.stride(0))
        carried = (*strides(dh_last, 2), *strides(h0, 2), *strides(reset, 2))
        outputs = (*dz.stride(), *dp_parts.stride(), *ddecay.values.stride(), *dh0.stride())
        of_gates = (*_gate_strides(decay), *strides(ddecay.context, 3), *decay.bounds())
        flags = {
            "SUMMED": summed,
            "HAS_DH_LAST": dh_last is not None,
            "HAS_H0": h0 is not None,
            "HAS_RESET": reset is not None,
            "INTERPRETED": INTERPRETED,
        }
        numbers = (time, channels, group, *inputs, *carried, *outputs, *of_gates)
        return Call((batch * blocks(channels, options["BD"]),), numbers, flags | decay.flags() | options)

    dw_g_parts, dbias_parts, dcontext_bias_parts = (*parts, None, None)[:3]
    launch(
        backward_kernel,
        (
            *(dh, dh_last, h, z, p, decay.values, w_g, h0, reset, dz, dp_parts, ddecay.values, dw_g_parts, dh0),
            *(decay.bias, decay.context, decay.context_bias, ddecay.context, dbias_parts, dcontext_bias_parts),
        ),
        prepare,
        summed,
        decay.low,
        decay.high,
    )


def states_before(h: Tensor, h0: Tensor | None, segments: int) -> Tensor:
    """The state that enters each segment, (B · S, D) fp32: as the whole sequence's backward would read it, from `h`."""
    last = h[:, h.shape[1] // segments - 1 :: h.shape[1] // segments].float()
    first = torch.zeros_like(last[:, :1]) if h0 is None else h0.float().unsqueeze(1)
    return torch.cat([first, last[:, :-1]], dim=1).flatten(0, 1)
