"""The operators as the benchmark sees them: inputs to draw, bytes and FLOPs that must be spent, shapes to time, a float64 truth."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmrec import ops
from mmrec.ops.exp_product_scan import exp_product_scan_naive
from mmrec.ops.gated_scan import gated_scan_naive
from mmrec.ops.linear_scan import linear_scan_naive
from mmrec.ops.memory_scan import memory_scan_naive
from mmrec.ops.short_convolution import short_convolution_naive
from mmrec.ops.window_attention import WindowState, window_attention_naive

# Ranges of log-decays. "spread": time constants of 2 … 2048 tokens, log-uniform, as the network starts.
GATES = {"ordinary": (-3.0, -0.01), "near 0": (-13.8, -8.0), "near 1": (-1e-4, -1e-6), "long": (-1e-3, -1e-6)}
CHUNK = 64  # tokens of the chunked form that memory_scan's FLOPs are counted for
SLICE = 16  # channels that are compared with the truth at a timed shape


def name_of(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Shape:
    """Sizes of one call. `D` counts all channels: H·K where there are heads, whose key and value widths are equal.

    `P` is gated_scan's, `W` the window of window_attention, `J` the taps of short_convolution.
    """

    B: int
    T: int
    D: int
    H: int | None = None
    P: int | None = None
    W: int | None = None
    J: int | None = None

    @property
    def K(self) -> int:
        """Width of a head."""
        return self.D // (self.H or 1)

    def __str__(self) -> str:
        channels = f"H{self.H}×{self.K}" if self.H else f"D{self.D}"
        others = "".join(f" {name}{size}" for name, size in (("P", self.P), ("W", self.W), ("J", self.J)) if size)
        return f"B{self.B} T{self.T} {channels}{others}"


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        op: what is measured, the public function.
        exact: the same function, called with float64 inputs only: the PyTorch form, which the truth is taken from.
        naive: the plain loop, which the truth is itself compared with.
        sequence: inputs with a time dimension, in the order of the signature.
        gate: the input that has the gates' dtype: log-decays; of a convolution the gains.
        constant: inputs without batch and time.
        state: name of the initial state.
        backward_reads: inputs, and "output" for the forward's first output, that the backward mathematically needs.
    """

    name: str
    op: Callable[..., tuple[Tensor, Tensor]]
    exact: Callable[..., tuple[Tensor, Tensor]]
    naive: Callable[..., tuple[Tensor, Tensor]]
    sequence: tuple[str, ...]
    gate: str
    state: str
    backward_reads: tuple[str, ...]
    constant: tuple[str, ...] = ()
    has_reset: bool = True


def _window_attention(
    function: Callable[..., tuple[Tensor, WindowState]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    temperature: Tensor,
    window: Tensor,
    W0: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """window_attention, or its truth, as the others are called: the window is an input, and states are one tensor.

    The initial one is (B, W − 1, H, K + V + 1): k, v and log α side by side, of tokens that are all seen. Of the last one only the values
    are returned, a view: putting the three together would be timed.
    """
    state = None
    if W0 is not None:
        keys, values, logs = W0.split([k.shape[-1], v.shape[-1], 1], dim=-1)
        state = WindowState(keys, values, logs.squeeze(-1), torch.ones(W0.shape[:2], dtype=torch.bool, device=W0.device))
    r, after = function(q, k, v, log_alpha, temperature, int(window), state, reset)
    return r, after.v


OPERATORS = {
    operator.name: operator
    for operator in (
        Operator(
            "linear_scan", ops.linear_scan, ops.linear_scan, linear_scan_naive, ("x", "log_a"), "log_a", "h0",
            ("log_a", "output", "h0", "reset"),
        ),
        Operator(
            "gated_scan", ops.gated_scan, ops.gated_scan, gated_scan_naive, ("z", "p", "log_gamma"), "log_gamma", "h0",
            ("z", "p", "log_gamma", "w_g", "output", "h0", "reset"), constant=("w_g",),
        ),
        Operator(
            "exp_product_scan", ops.exp_product_scan, ops.exp_product_scan, exp_product_scan_naive, ("log_gamma",), "log_gamma", "y0",
            ("output", "y0"), has_reset=False,
        ),
        Operator(
            "memory_scan", ops.memory_scan, ops.memory_scan, memory_scan_naive, ("q", "k", "v", "log_alpha"), "log_alpha", "M0",
            ("q", "k", "v", "log_alpha", "M0", "reset"),
        ),
        Operator(
            "window_attention", partial(_window_attention, ops.window_attention), partial(_window_attention, ops.window_attention),
            partial(_window_attention, window_attention_naive), ("q", "k", "v", "log_alpha"), "log_alpha", "W0",
            ("q", "k", "v", "log_alpha", "temperature", "output", "W0", "reset"), constant=("temperature",),
        ),
        Operator(
            "short_convolution", ops.short_convolution, ops.short_convolution, short_convolution_naive, ("x",), "weight", "state",
            ("x", "weight", "state", "reset"), constant=("weight",),
        ),
    )
}  # fmt: skip


def tail_shape(operator: Operator, name: str, shape: Shape) -> tuple[int, ...]:
    """An input's dimensions after batch and time (all of them for a constant, those after batch for the state)."""
    if shape.H:
        sizes = {"log_alpha": (shape.H,), "temperature": (shape.H,), "M0": (shape.H, shape.K, shape.K)}
        return ((shape.W or 1) - 1, shape.H, 2 * shape.K + 1) if name == "W0" else sizes.get(name, (shape.H, shape.K))
    sizes = {"p": (shape.P or shape.D,), "weight": (shape.D, shape.J or 1), "state": ((shape.J or 1) - 1, shape.D)}
    return sizes.get(name, (shape.D,))


def log_decays(size: Sequence[int], gates: str, device: torch.device) -> Tensor:
    """Random log-decays in fp32, of a range of GATES or "spread"."""
    uniform = torch.rand(size, device=device)
    if gates == "spread":
        return -torch.exp(-(uniform * 10 + 1) * 0.6931472)  # −1/τ, τ = 2^1 … 2^11
    low, high = GATES[gates]
    return low + (high - low) * uniform


def draw(
    operator: Operator,
    shape: Shape,
    dtype: torch.dtype,
    gate_dtype: torch.dtype,
    device: torch.device,
    gates: str = "spread",
    *,
    state: bool = False,
    reset: bool = False,
    strided: bool = False,
    slope: float | None = None,
) -> dict[str, Any]:
    """Fresh random inputs, by the names of the operator's signature.

    Args:
        state: with an initial state, fp32.
        reset: with document starts, one token in ten.
        strided: sequence inputs of one dtype are slices of one buffer, as the network's are of its fused projection.
        slope: for gated_scan, the largest |z·w_g|/4, with the sign of z·w_g; None draws w_g with a standard deviation of 0.5.
    """
    sizes = {name: (shape.B, shape.T, *tail_shape(operator, name, shape)) for name in operator.sequence}
    inputs: dict[str, Any] = {}
    for name, size in sizes.items():
        if name == operator.gate:
            inputs[name] = log_decays(size, gates, device).to(gate_dtype)
        else:
            inputs[name] = torch.randn(size, device=device, dtype=dtype)
            if name in ("q", "k"):  # the network normalises them; products of a wide head would overflow fp16
                inputs[name] *= shape.K**-0.5
    for name in operator.constant:
        size = tail_shape(operator, name, shape)
        # A window's temperature makes scores of order 1, as a network's are.
        inputs[name] = (0.5 + torch.rand(size, device=device)) * shape.K**0.5 if shape.W else 0.5 * torch.randn(size, device=device)
        if name == operator.gate:
            inputs[name] = inputs[name].to(gate_dtype)
    if slope is not None:
        sign = torch.randn(shape.D, device=device).sign()
        inputs["z"] = (sign * (0.5 + 0.5 * torch.rand(sizes["z"], device=device))).to(dtype)
        inputs["w_g"] = 4 * slope * sign
    if strided:
        inputs |= _sliced({name: inputs[name] for name in operator.sequence})
    if state:
        inputs[operator.state] = torch.randn((shape.B, *tail_shape(operator, operator.state, shape)), device=device)
        if shape.W:  # like the sequence's
            inputs["W0"][..., : shape.K] *= shape.K**-0.5
            inputs["W0"] = inputs["W0"].to(dtype).float()
            inputs["W0"][..., -1] = log_decays((shape.B, shape.W - 1, shape.H or 1), gates, device)
        if shape.J:  # tokens that were read
            inputs["state"] = inputs["state"].to(dtype).float()
    if shape.W:
        inputs["window"] = torch.tensor(shape.W)
    if reset and operator.has_reset:
        inputs["reset"] = torch.rand(shape.B, shape.T, device=device) < 0.1
    return inputs


def _sliced(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values as views into one buffer a dtype, with NaN columns around them."""
    views = {}
    for dtype in {tensor.dtype for tensor in tensors.values()}:
        group = {name: tensor.flatten(2) for name, tensor in tensors.items() if tensor.dtype == dtype}
        first = next(iter(group.values()))
        pad = first.new_full((*first.shape[:2], 8), float("nan"))
        buffer = torch.cat([part for flat in group.values() for part in (pad, flat)] + [pad], dim=-1)
        start = 0
        for name, flat in group.items():
            start += 8
            views[name] = buffer[..., start : start + flat.shape[-1]].unflatten(-1, tensors[name].shape[2:])
            start += flat.shape[-1]
    return views


def run(
    function: Callable[..., tuple[Tensor, Tensor]], inputs: dict[str, Any], cotangents: Sequence[Tensor | None], options: dict[str, Any]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Both outputs, and the gradients to all inputs for the given cotangents of the outputs (None: the output is not used)."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items() if t.is_floating_point()}
    outputs = function(**(inputs | leaves), **options)
    used = [(output, cotangent) for output, cotangent in zip(outputs, cotangents, strict=True) if cotangent is not None]
    gradients = torch.autograd.grad([o for o, _ in used], list(leaves.values()), [c for _, c in used], allow_unused=True)
    found = {name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in zip(leaves.items(), gradients, strict=True)}
    if "temperature" in found:
        # A sum of terms of both signs, a token each, may be nothing beside what was rounded of them. Three standard deviations of such sums
        # stand beside it, so that an error is relative to them.
        terms = (leaves["q"].detach() * found["q"]).sum(-1) / leaves["temperature"].detach()
        found["temperature"] = torch.stack([found["temperature"], 3 * terms.flatten(0, 1).norm(dim=0)], dim=-1)
    return [output.detach() for output in outputs], found


def in_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same values, widened."""
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


def channel_slice(operator: Operator, shape: Shape, first: int) -> tuple[dict[str, Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]:
    """Some neighbouring channels (or a head) of every input and of the output: there an operator is independent of the rest.

    Args:
        first: the first group of channels, counted in groups of SLICE channels, or in heads where there are some.

    Returns:
        What cuts each input (and its gradient), by name, and what cuts the first output.
    """
    if shape.H:
        per_token = lambda t: t[:, :, first : first + 1]  # noqa: E731
        others = {"M0": lambda t: t[:, first : first + 1], "temperature": lambda t: t[first : first + 1]}
        return dict.fromkeys((*operator.sequence, "W0"), per_token) | others, per_token
    group = shape.D // (shape.P or shape.D)
    width = min(shape.D, max(SLICE, group))
    begin = first * width
    channels = lambda t: t[..., begin : begin + width]  # noqa: E731
    cuts = dict.fromkeys((*operator.sequence, *operator.constant, operator.state), channels)
    others = {"p": lambda t: t[..., begin // group : (begin + width) // group], "weight": lambda t: t[begin : begin + width]}
    return cuts | others, channels


def slices(operator: Operator, shape: Shape) -> int:
    """How many values `first` of `channel_slice` has."""
    if shape.H:
        return shape.H
    return max(1, shape.D // max(SLICE, shape.D // (shape.P or shape.D)))


def moved_bytes(operator: Operator, inputs: dict[str, Tensor], outputs: Sequence[Tensor], direction: str) -> int:
    """The fewest bytes a direction moves through device memory, for the tensors actually passed, each at its own dtype and width.

    Forward: every input read once, every output (the last state too) written once. Forward+backward adds the cotangent of the first
    output and what the backward needs (`backward_reads`), each read once, and a gradient a floating-point input, written once. With
    bf16 values and fp32 gates, per element: linear_scan 2+4+2 = 8 and 8 + (2 + 4+2 + 2+4) = 22; gated_scan with P = D 2+2+4+2 = 10 and
    10 + (2 + 2+2+4+2 + 2+2+4) = 30; exp_product_scan in fp32 8 and 8 + (4 + 4 + 4) = 20: a backward is another pass over its inputs;
    short_convolution 2+2 = 4 and 4 + (2 + 2 + 2) = 10.
    """
    # A window's and a convolution's last state is a view of the inputs: nobody writes it.
    given = {t.untyped_storage().data_ptr() for t in inputs.values()}
    moved = sum(t.nbytes for t in inputs.values()) + sum(t.nbytes for t in outputs if t.untyped_storage().data_ptr() not in given)
    if direction == "fwd":
        return moved
    read = sum((inputs | {"output": outputs[0]})[name].nbytes for name in operator.backward_reads if name in inputs or name == "output")
    return moved + outputs[0].nbytes + read + sum(t.nbytes for t in inputs.values() if t.is_floating_point())


def flops(operator: Operator, shape: Shape, direction: str) -> int:
    """Floating-point operations of the matrix products; 0 for the elementwise operators, which are bound by bytes.

    memory_scan in chunks of C = 64 tokens, of which a token sees (C+1)/2 on average: q·k and the product with v within the chunk,
    2·K·V for q·M and 2·K·V for k vᵀ a token and head. The backward has five products of either kind: the scores again, dP, dq, dk, dv;
    the states again, dM, and across chunks dq, dk, dv. window_attention has the first kind alone, a query's over at most W keys.
    """
    products = 2 if direction == "fwd" else 2 + 5
    if operator.name == "window_attention":
        window = min(shape.W or 1, shape.T)
        pairs = window * shape.T - window * (window - 1) // 2
        return shape.B * (shape.H or 1) * products * 2 * pairs * shape.K
    if operator.name != "memory_scan":
        return 0
    chunk = min(CHUNK, shape.T)
    within, across = (chunk + 1) * shape.K, 2 * shape.K * shape.K
    return shape.B * shape.T * (shape.H or 1) * products * (within + across)


@dataclass(frozen=True)
class Timing:
    """One thing to time: an operator at a shape, in the given dtypes, in both directions unless said otherwise."""

    operator: str
    shape: Shape
    dtype: torch.dtype = torch.bfloat16
    gate_dtype: torch.dtype = torch.float32
    directions: tuple[str, ...] = ("fwd", "fwdbwd")
    state: bool = False
    reset: bool = False  # with document starts, as packed training has them
    accum: torch.dtype | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments beside the tensors."""
        return {} if self.accum is None else {"accum_dtype": self.accum}


def timings(quick: bool, device: torch.device) -> list[Timing]:
    """What the benchmark times; with `quick` one shape an operator, tiny ones on a CPU."""
    bf16, fp32, fp64 = torch.bfloat16, torch.float32, torch.float64
    if device.type == "cpu":
        shape, heads = Shape(2, 40, 32), Shape(2, 70, 16, H=2)
        return [
            Timing("linear_scan", shape),
            Timing("gated_scan", dataclasses.replace(shape, P=8)),
            Timing("exp_product_scan", shape, fp32, accum=fp64),
            Timing("memory_scan", heads),
            Timing("window_attention", dataclasses.replace(heads, W=24)),
            Timing("short_convolution", dataclasses.replace(shape, J=4)),
        ]
    whole, long = Shape(4, 2048, 4096), Shape(1, 32768, 4096)
    found = [Timing("linear_scan", shape, gate_dtype=gate) for gate in (fp32, bf16) for shape in (whole, long, Shape(8, 2048, 768))]
    found += [Timing("gated_scan", dataclasses.replace(shape, P=shape.D)) for shape in (whole, long)]
    found += [Timing("gated_scan", Shape(1, 32768, 1024, P=1024)), Timing("gated_scan", Shape(1, 131072, 512, P=512))]
    found += [
        Timing("gated_scan", dataclasses.replace(whole, P=512)),
        Timing("gated_scan", dataclasses.replace(whole, P=4096), gate_dtype=bf16),
    ]
    found += [Timing("exp_product_scan", Shape(1, 131072, 4096), fp32, accum=accum) for accum in (fp32, fp64)]
    found += [Timing("exp_product_scan", whole, fp32, accum=accum) for accum in (fp32, fp64)]
    found += [Timing("exp_product_scan", whole, bf16, bf16, accum=fp32)]
    found += [Timing("memory_scan", Shape(4, 2048, 4096, H=heads)) for heads in (32, 8, 16, 64)]
    found += [Timing("memory_scan", Shape(b, t, 4096, H=32)) for b, t in ((1, 8192), (4, 8192), (1, 32768))]
    found += [Timing("memory_scan", Shape(8, 1, 4096, H=32), directions=("fwd",), state=True)]
    packed = [("linear_scan", whole), ("gated_scan", dataclasses.replace(whole, P=4096)), ("memory_scan", dataclasses.replace(whole, H=32))]
    found += [Timing(name, shape, reset=True) for name, shape in packed]
    # Not packed: what documents hide of a window would be counted in its floor.
    windows = ((8, 2048, 512), (8, 2048, 2048), (1, 32768, 512))
    found += [Timing("window_attention", Shape(b, t, 1536, H=12, W=w)) for b, t, w in windows]
    found += [Timing("short_convolution", Shape(b, t, 1536, J=4)) for b, t in ((8, 2048), (1, 32768))]
    if quick:
        return [next(timing for timing in found if timing.operator == name) for name in OPERATORS]
    return found
