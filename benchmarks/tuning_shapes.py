"""What tuning an operator takes: another table for its launches, shapes to time, and checks of what they compute."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from operator_cases import OPERATORS, Shape, Timing, channel_slice, draw, in_float64, name_of, run, timings
from operator_parity import LIMIT, LONG_LOOP, poisoned, relative
from torch import Tensor

from mmrec.measuring.machine import device
from mmrec.ops import tuning

Key = tuple[str, str]  # kernel, shape class
Options = dict[str, Any]
Kernels = dict[str, dict[str, Options]]
Forced = tuple[tuple[str, Options], ...]  # kernels with options that replace the table's; of two for one row the first counts
WINDOW = 512  # tokens that window_attention's tiles are chosen for


def is_plan(options: Options) -> bool:
    """Whether options choose between kernels rather than compile one."""
    return "num_warps" not in options


class Recording(dict[str, Options]):
    """A kernel's rows of the table; notes which was read, and answers with the options forced on the kernel, whatever the shape class.

    A kernel may have a row that is a plan beside rows that compile it: forced options replace only rows of their own kind.
    """

    def __init__(self, kernel: str, rows: dict[str, Options], forced: Sequence[Options], used: set[Key]) -> None:
        super().__init__(rows)
        self.kernel, self.forced, self.used = kernel, forced, used

    def __getitem__(self, shape_class: str) -> Options:
        self.used.add((self.kernel, shape_class))
        present = super().__getitem__(shape_class)
        return next((options for options in self.forced if is_plan(options) == is_plan(present)), present)


@contextmanager
def using(kernels: Kernels, forced: Forced = ()) -> Iterator[set[Key]]:
    """Launch with this table, and options forced on kernels; yields the rows that were read."""
    used: set[Key] = set()
    chosen = {name: [options for kernel, options in forced if kernel == name] for name in kernels}
    table = {"kernels": {name: Recording(name, rows, chosen[name], used) for name, rows in kernels.items()}}
    # `overridden`, with nothing, lets the launchers forget what they remember of the table.
    with patch.object(tuning, "read_table", lambda name: table), tuning.overridden():
        yield used


def tuned_shapes(quick: bool) -> list[Timing]:
    """What is timed: the benchmark's shapes, where they fit sixteen times into the memory, and what reaches the remaining rows."""
    fp32 = torch.float32
    found = [t for t in timings(quick, device()) if t.shape.B * t.shape.T * t.shape.D <= 2**27 and t.gate_dtype == fp32 and not t.reset]
    if quick:
        return found
    found = [t for t in found if t.shape.W in (None, WINDOW)]
    for accum in (torch.float32, torch.float64):  # with a start, whose gradient has a kernel of its own
        found += [Timing("exp_product_scan", Shape(b, t, 4096), fp32, state=True, accum=accum) for b, t in ((1, 32768), (4, 2048))]
    few = [(32, 64), (8, 256), (2, 512)]  # heads of one sequence, and their width
    found += [Timing("memory_scan", Shape(1, 8192, heads * width, H=heads)) for heads, width in few]
    for batch, heads, width in ((8, 8, 512), (1, 32, 128), (1, 2, 512)):
        found += [Timing("memory_scan", Shape(batch, 1, heads * width, H=heads), directions=("fwd",), state=True)]
    found += [Timing("memory_scan", Shape(2, 2048, 1024, H=8), fp32)]
    windows = [(4, 128), (8, 64), (2, 256)]
    found += [Timing("window_attention", Shape(8, 2048, heads * width, H=heads, W=WINDOW)) for heads, width in windows]
    return found


class Prepared:
    """A timed shape: its inputs, the two passes, and what their results must be."""

    def __init__(self, timing: Timing) -> None:
        self.timing, self.operator = timing, OPERATORS[timing.operator]
        torch.manual_seed(0)
        self.inputs = self._draw(timing.shape, timing.state)
        with torch.no_grad():
            self.cotangent = torch.randn_like(self.operator.op(**self.inputs, **timing.options)[0])
        # Few tokens, an odd number; channels as before, which keeps what the compiled kernel was specialised for.
        length = (
            4099 if timing.operator == "gated_scan" and timing.shape.T > 4099 else min(333, timing.shape.T)
        )  # it has a form for long ones
        self.small = self._draw(replace(timing.shape, B=2, T=length), True, reset=True)
        self.first: list[Tensor] | None = None
        self._small_truth: list[Tensor] | None = None
        self._truth: list[Tensor] | None = None

    def _draw(self, shape: Shape, state: bool, reset: bool = False) -> dict[str, Any]:
        return draw(self.operator, shape, self.timing.dtype, self.timing.gate_dtype, device(), state=state, reset=reset)

    @property
    def label(self) -> str:
        """Shape, and what else tells it from the others of its operator."""
        kind = self.timing.accum if self.timing.accum == torch.float64 else self.timing.dtype
        return f"{self.timing.shape} {name_of(kind)}" + " with a start" * self.timing.state

    @property
    def has_backward(self) -> bool:
        """A decoding step is timed forward only."""
        return "fwdbwd" in self.timing.directions

    def passes(self) -> dict[str, Any]:
        """The forward alone, and forward and backward: a backward cannot be replayed without what it goes back through."""
        leaves = {name: t.detach().requires_grad_() for name, t in self.inputs.items() if t.is_floating_point()}

        def forward() -> None:
            with torch.no_grad():
                self.operator.op(**self.inputs, **self.timing.options)

        if not self.has_backward:
            return {"forward": forward}

        def backward() -> None:
            output = self.operator.op(**(self.inputs | leaves), **self.timing.options)[0]
            torch.autograd.grad(output, list(leaves.values()), self.cotangent)

        return {"forward": forward, "backward": backward}

    def results(self, inputs: dict[str, Any], cotangents: Sequence[Tensor | None], exact: bool = False) -> list[Tensor]:
        """Outputs and gradients, in a fixed order."""
        if exact:
            outputs, gradients = run(self.operator.exact, in_float64(inputs), [c if c is None else c.double() for c in cotangents], {})
        else:
            outputs, gradients = run(self.operator.op, inputs, cotangents, self.timing.options)
        return [*outputs, *gradients.values()]

    def _compare(self, what: str, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
            error, limit = relative(a, b), max(LIMIT[self.timing.dtype], LIMIT[a.dtype])
            if not error <= limit:
                raise ArithmeticError(f"{what}: tensor {index} is off by {error:.1e} > {limit:.0e}")

    def check(self) -> None:
        """Raise unless the options in use compute the truth.

        Raises:
            ArithmeticError: a tensor is off.
        """
        generator = torch.Generator(device()).manual_seed(1)
        small = self.operator.op(**self.small, **self.timing.options)
        cotangents = [torch.randn(o.shape, generator=generator, device=o.device, dtype=torch.float32).to(o.dtype) for o in small]
        with poisoned():
            actual = self.results(self.small, cotangents)
        if self._small_truth is None:
            self._small_truth = self.results(self.small, cotangents, exact=True)
        self._compare("a short sequence against float64", actual, self._small_truth)
        actual = self.results(self.inputs, [self.cotangent, None])
        self._check_channels(actual)
        if self.first is None:
            self.first = actual
        self._compare("against the present options", actual, self.first)

    def _check_channels(self, actual: Sequence[Tensor]) -> None:
        """The first few channels at the timed size; a truth by a loop over very long sequences would take seconds."""
        operator, shape = self.operator, self.timing.shape
        if operator.name in ("gated_scan", "linear_scan") and shape.T > LONG_LOOP:
            return
        cut, cut_output = channel_slice(operator, shape, 0)
        names = [name for name, t in self.inputs.items() if t.is_floating_point()]
        cuts = [cut_output, cut[operator.state], *(cut[name] for name in names)]
        if self._truth is None:
            few = {name: cut[name](tensor) if name in cut else tensor for name, tensor in self.inputs.items()}
            self._truth = self.results(few, [cut_output(self.cotangent), None], exact=True)
        self._compare("channels at this size against float64", [c(a) for c, a in zip(cuts, actual, strict=True)], self._truth)


def compile_one(job: tuple[Timing, Kernels, Forced]) -> float:
    """In a process of its own: run both passes with these options, so that the compiled kernel lies in the cache. Seconds it took."""
    timing, kernels, forced = job
    with using(kernels, forced):
        begin = time.perf_counter()
        operator = OPERATORS[timing.operator]
        inputs = draw(operator, timing.shape, timing.dtype, timing.gate_dtype, device(), state=timing.state, reset=timing.reset)
        output = operator.op(**inputs, **timing.options)[0]
        if "fwdbwd" in timing.directions:
            run(operator.op, inputs, [torch.randn_like(output), None], timing.options)
        output.sum().item()
        return time.perf_counter() - begin


def rows_read(job: tuple[Timing, Kernels, Forced]) -> dict[str, list[Key]]:
    """In a process of its own: which rows of the table the forward and the backward of a shape read, with these options forced."""
    timing, kernels, forced = job
    operator = OPERATORS[timing.operator]
    inputs = draw(operator, timing.shape, timing.dtype, timing.gate_dtype, device(), state=timing.state, reset=timing.reset)
    leaves = {name: t.requires_grad_() for name, t in inputs.items() if t.is_floating_point() and "fwdbwd" in timing.directions}
    with using(kernels, forced) as used:
        output = operator.op(**(inputs | leaves), **timing.options)[0]
    found = {"forward": sorted(used)}
    if leaves:
        with using(kernels, forced) as used:
            torch.autograd.grad(output, list(leaves.values()), torch.randn_like(output))
        found["backward"] = sorted(used)
    return found
