"""Are the operators right? Values and every gradient against float64, on fresh random inputs and poisoned memory."""

import itertools
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from gated_shadow import along_its_states
from operator_cases import OPERATORS, Shape, Timing, channel_slice, draw, in_float64, name_of, run, slices
from torch import Tensor

from mmrec.measuring.failures import Failure
from mmrec.measuring.machine import device
from mmrec.measuring.processes import map_in_processes

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# ‖a − b‖ / ‖b‖ a tensor; a bf16 gradient of an fp32 computation is held to what bf16 can hold.
LIMIT = {BF16: 1e-2, FP16: 2e-3, FP32: 1e-4, FP64: 1e-9}
POINTWISE = 1e-6  # exp_product_scan summed in float64: relative a value above TINY, TINY itself below
TINY = 1e-30
LONG_LOOP = 40000  # tokens; a truth by a longer loop over time takes seconds
DTYPES = [(dtype, gate) for dtype in (FP32, BF16, FP16) for gate in (FP32, BF16)]


@dataclass(frozen=True)
class Case:
    """One set of inputs; see `operator_cases.draw`.

    Attributes:
        cotangents: which outputs receive a cotangent: "both", or only the "last" state.
        options: keyword arguments beside the tensors.
        seed: of the inputs.
    """

    operator: str
    shape: Shape
    dtype: torch.dtype
    gate_dtype: torch.dtype
    gates: str = "ordinary"
    state: bool = True
    reset: bool = False
    strided: bool = False
    slope: float | None = None
    cotangents: str = "both"
    options: tuple[tuple[str, Any], ...] = ()
    seed: int = 0

    def __str__(self) -> str:
        marks = [name for name in ("state", "reset", "strided") if getattr(self, name)]
        marks += [] if self.slope is None else [f"z·w_g/4 {self.slope:g}"]
        marks += [f"{name}={name_of(v) if isinstance(v, torch.dtype) else v}" for name, v in self.options]
        marks += [] if self.cotangents == "both" else [f"cotangent of the {self.cotangents} state only"]
        dtypes = f"{name_of(self.dtype)}, gates {name_of(self.gate_dtype)} {self.gates}"
        return ", ".join([f"{self.operator} {self.shape} {dtypes}", *marks, f"seed {self.seed}"])


@dataclass(frozen=True)
class Finding:
    """How far one tensor is from the truth. `error` is NaN or infinite where there is no figure; `of_output` is false for gradients."""

    operator: str
    case: str
    dtype: torch.dtype
    options: tuple[tuple[str, Any], ...]
    tensor: str
    of_output: bool
    error: float
    limit: float
    note: str = ""

    @property
    def missed(self) -> bool:
        """NaN misses as well."""
        return not self.error <= self.limit


@contextmanager
def poisoned() -> Iterator[None]:
    """`torch.empty` returns NaN, so that an element that nobody wrote shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of what has no deterministic form
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = before
            torch.use_deterministic_algorithms(False)


def relative(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; absolute where the expected is below TINY, which fp32 need not hold. NaN stays."""
    actual, expected = actual.double(), expected.double()
    norm = expected.norm().item()
    return (actual - expected).norm().item() / (norm if norm > TINY else 1.0)


def pointwise(actual: Tensor, expected: Tensor) -> float:
    """The largest |actual − expected|/|expected|; below TINY, the absolute error, scaled so that TINY counts as POINTWISE."""
    difference = (actual.double() - expected.double()).abs()
    size = expected.double().abs()
    return torch.where(size > TINY, difference / size.clamp_min(TINY), difference * (POINTWISE / TINY)).max().item()


def compare(
    case: Case, outputs: Sequence[Tensor], gradients: dict[str, Tensor], expected: Sequence[Tensor], expected_gradients: dict[str, Tensor]
) -> list[Finding]:
    """A finding a tensor."""
    operator = OPERATORS[case.operator]
    pairs = [("output", outputs[0], expected[0]), (f"last {operator.state.rstrip('0')}", outputs[1], expected[1])]
    pairs += [(f"d{name}", gradients[name], expected_gradients[name]) for name in gradients]
    found = []
    for name, actual, wanted in pairs:
        limit = max(LIMIT[case.dtype], LIMIT[actual.dtype])
        if name.startswith("d") and case.dtype != FP32 and abs(case.slope or 0) >= 20:
            limit *= 3  # the backward's h_{t-1} is the rounded output, and w_g, up to 400, multiplies its rounding in the gate
        error = relative(actual, wanted) if actual.shape == wanted.shape else float("inf")
        found.append(Finding(case.operator, str(case), case.dtype, case.options, name, not name.startswith("d"), error, limit))
    if ("accum_dtype", FP64) in case.options and outputs[0].dtype == FP32:
        error = pointwise(outputs[0], expected[0])
        found.append(replace(found[0], tensor="output, worst value", error=error, limit=POINTWISE))
    return found


def cotangents_of(case: Case, outputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Random cotangents in the outputs' dtypes; of a strided case, slices of wider tensors."""
    found: list[Tensor | None] = []
    for output in outputs:
        wide = torch.randn((*output.shape[:-1], output.shape[-1] + 8 * case.strided), device=output.device, dtype=output.dtype)
        found.append(wide[..., : output.shape[-1]])
    if case.cotangents == "last":
        found[0] = None
    return found


def _moved(tensors: Any, where: torch.device | None) -> Any:
    """A list or a mapping of tensors on another device; None leaves them."""
    if where is None:
        return tensors
    if isinstance(tensors, dict):
        return {name: tensor.to(where) for name, tensor in tensors.items()}
    return [None if tensor is None else tensor.to(where) for tensor in tensors]


def check(case: Case, truth_on: torch.device | None = None) -> list[Finding]:
    """The operator on poisoned memory against the float64 truth; where it misses, how far the plain loop in fp32 is says why.

    Args:
        case: the inputs.
        truth_on: where the truth is computed; None: where the operator runs.
    """
    operator, where = OPERATORS[case.operator], device()
    torch.manual_seed(case.seed)
    inputs = draw(
        operator, case.shape, case.dtype, case.gate_dtype, where, case.gates,
        state=case.state, reset=case.reset, strided=case.strided, slope=case.slope,
    )  # fmt: skip
    options, exact_options = dict(case.options), {name: v for name, v in case.options if name != "accum_dtype"}
    with torch.no_grad():
        cotangents = cotangents_of(case, operator.op(**inputs, **options))
    with poisoned():
        outputs, gradients = run(operator.op, inputs, cotangents, options)
    inputs, outputs, gradients, cotangents = (_moved(part, truth_on) for part in (inputs, outputs, gradients, cotangents))
    widened = [None if cotangent is None else cotangent.double() for cotangent in cotangents]
    expected, expected_gradients = run(operator.exact, in_float64(inputs), widened, exact_options)
    found = compare(case, outputs, gradients, expected, expected_gradients)
    if any(finding.missed for finding in found) and _loop_is_short(case):
        narrow = {name: t.float() if t.is_floating_point() else t for name, t in inputs.items()}
        loop, loop_gradients = run(operator.naive, narrow, [None if c is None else c.float() for c in cotangents], exact_options)
        plain = {f.tensor: f.error for f in compare(case, loop, loop_gradients, expected, expected_gradients)}
        found = [replace(f, note=f"the plain loop in fp32: {plain.get(f.tensor, float('nan')):.1e}") if f.missed else f for f in found]
        # An error of 1e-5 is fp32's rounding grown a hundredfold; the rounding of a bf16 state grows as much.
        comparable = [f for f in found if not f.missed or plain.get(f.tensor, 0.0) <= (f.limit / 3 if case.dtype == FP32 else 1e-5)]
        if case.slope is not None and len(comparable) < len(found):
            found = comparable + _without_truth(case, found[0], in_float64(inputs), outputs, gradients, cotangents)
    return found


def _loop_is_short(case: Case) -> bool:
    """Whether the plain loop, with autograd behind it, takes no more than seconds and gigabytes."""
    if case.operator == "memory_scan":
        return case.shape.T <= 2100 and case.shape.K <= 128
    if case.shape.W:  # which it carries whole from token to token
        return case.shape.T * case.shape.W * case.shape.D <= 2**25
    return case.shape.T <= 9000


def _without_truth(
    case: Case, like: Finding, inputs: dict[str, Any], outputs: list[Tensor], gradients: dict[str, Tensor], cotangents: list[Any]
) -> list[Finding]:
    """For a chaotic gated_scan, which the plain loop in fp32 misses too: the states' bound; in fp32 every step, and its adjoint."""
    like = replace(like, of_output=True, note="chaotic: the plain loop in fp32 misses float64 as well")
    bound = max(inputs["z"].abs().max().item(), inputs["h0"].abs().max().item() if "h0" in inputs else 0.0)
    size = max(output.abs().max().item() for output in outputs)  # NaN stays
    found = [replace(like, tensor="size of the states over their bound", error=size / bound, limit=1 + LIMIT[case.dtype])]
    if case.dtype == FP32:
        for name, actual, wanted, limit in along_its_states(inputs, outputs, gradients, cotangents):
            found.append(replace(like, tensor=name, of_output=not name.startswith("d"), error=relative(actual, wanted), limit=limit))
    return found


def check_truth(name: str, seed: int) -> list[Finding]:
    """The float64 PyTorch form, which is the truth at lengths where the plain loop takes too long, against the plain loop."""
    operator, where = OPERATORS[name], device()
    torch.manual_seed(seed)
    heads = 2 if name in ("memory_scan", "window_attention") else None
    sizes = {"gated_scan": {"P": 8}, "window_attention": {"W": 40}, "short_convolution": {"J": 4}}.get(name, {})
    shape = Shape(2, 129, 24, H=heads, **sizes)
    found = []
    for gates in ("ordinary", "near 0", "near 1"):
        inputs = in_float64(draw(operator, shape, FP32, FP32, where, gates, state=True, reset=True))
        case = Case(name, shape, FP64, FP64, gates, reset=operator.has_reset, seed=seed)
        with torch.no_grad():
            cotangents = cotangents_of(case, operator.naive(**inputs))
        parts = (*run(operator.exact, inputs, cotangents, {}), *run(operator.naive, inputs, cotangents, {}))
        found += [replace(finding, case=f"the truth itself: {finding.case}") for finding in compare(case, *parts)]
    return found


def check_at(timing: Timing, inputs: dict[str, Any], result: tuple[list[Tensor], dict[str, Tensor]], cotangent: Tensor) -> list[Finding]:
    """What was timed, on some channels (a head), against the truth at the same length; cotangent of the first output only."""
    operator = OPERATORS[timing.operator]
    case = Case(
        timing.operator, timing.shape, timing.dtype, timing.gate_dtype, "spread", timing.state, options=tuple(timing.options.items())
    )
    if operator.name == "gated_scan" and timing.shape.T > LONG_LOOP:
        return []
    cut, cut_output = channel_slice(operator, timing.shape, int(torch.randint(slices(operator, timing.shape), ()).item()))
    exact_inputs = in_float64({name: cut[name](tensor) if name in cut else tensor for name, tensor in inputs.items()})
    expected, expected_gradients = run(operator.exact, exact_inputs, [cut_output(cotangent).double(), None], {})
    (output, last), gradients = result
    last = cut[operator.state](last)
    return compare(case, (cut_output(output), last), {n: cut[n](g) for n, g in gradients.items()}, expected, expected_gradients)


def cases(names: Sequence[str], quick: bool, seed: int) -> list[Case]:
    """All cases of the named operators: lengths, widths, gates, dtypes, states, resets and strides in turn, so that all meet all.

    With `quick` only a few, small ones.
    """
    found = [case for name in names for case in _cases(name, quick)]
    return [replace(case, seed=(seed + index) % 2**31) for index, case in enumerate(found)]


def _cases(name: str, quick: bool) -> Iterator[Case]:
    lengths = itertools.cycle((7, 129, 33) if quick else (129, 1000, 2049, 7, 1))
    marks = itertools.cycle([(True, True, False), (False, False, True), (True, False, True), (False, True, False)])
    if name == "memory_scan":
        heads = ((2, 16), (1, 20)) if quick else ((2, 64), (3, 128), (2, 40), (2, 256), (1, 512))
        widths = itertools.cycle([Shape(2, 1, h * k, H=h) for h, k in heads])
    elif name == "window_attention":
        windows = ((2, 16, 24), (1, 20, 5)) if quick else ((2, 64, 100), (3, 128, 257), (1, 256, 33), (2, 40, 1))
        widths = itertools.cycle([Shape(2, 1, h * k, H=h, W=w) for h, k, w in windows])
    elif name == "short_convolution":
        taps = ((24, 4), (37, 2), (24, 16)) if quick else ((640, 4), (37, 4), (128, 2), (96, 16), (40, 1))
        widths = itertools.cycle([Shape(2, 1, d, J=j) for d, j in taps])
    else:
        sizes = ((24, 8), (37, 37)) if quick else ((640, 80), (37, 37), (128, 128), (96, 96))
        widths = itertools.cycle([Shape(2, 1, d, P=p if name == "gated_scan" else None) for d, p in sizes])

    if name == "exp_product_scan":
        yield from _exp_product_cases(quick, lengths, widths, marks)
        return
    every = DTYPES[:3:2] if quick else DTYPES
    for index, ((dtype, gate_dtype), gates) in enumerate(itertools.product(every, ("ordinary", "near 0", "near 1"))):
        state, reset, strided = next(marks)
        shape = replace(next(widths), T=next(lengths))
        scale = (("scale", 0.5),) if name == "memory_scan" and index % 3 == 2 else ()
        yield Case(name, shape, dtype, gate_dtype, gates, state, reset, strided, options=scale)
        if index % 6 == 1:
            yield Case(name, shape, dtype, gate_dtype, gates, state=True, cotangents="last")
    if quick:
        return
    others = {
        "memory_scan": Shape(1, 4099, 64, H=1),
        "window_attention": Shape(1, 4099, 64, H=1, W=512),
        "short_convolution": Shape(1, 8211, 40, J=4),
    }
    long = others.get(name, Shape(1, 8211, 40, P=40 if name == "gated_scan" else None))
    for dtype in (FP32, BF16):
        yield Case(name, long, dtype, FP32, "near 1", reset=True)
        yield Case(name, replace(long, T=1, B=5), dtype, FP32)
        if long.H:  # all widths, with gates near 1, where the state is largest
            yield from (Case(name, replace(long, T=193, D=k), dtype, FP32, "near 1") for k in (64, 128, 256, 512))
    if name == "gated_scan":
        slopes = [0.0, *(sign * slope for slope in (1.0, 5.0, 20.0, 100.0) for sign in (1, -1))]
        for slope, shape in itertools.product(slopes, (Shape(2, 517, 96, P=96), Shape(1, 8211, 40, P=8))):
            yield Case(name, shape, FP32, FP32, "ordinary", slope=slope, reset=shape.B == 2)
            yield Case(name, shape, BF16, FP32, "near 1" if shape.B == 2 else "ordinary", slope=slope)


def _exp_product_cases(
    quick: bool, lengths: Iterator[int], widths: Iterator[Shape], marks: Iterator[tuple[bool, bool, bool]]
) -> Iterator[Case]:
    for dtype, accum, gates in itertools.product((FP32, BF16), (FP32, FP64), ("ordinary", "near 0", "near 1")):
        state, _, strided = next(marks)
        shape = replace(next(widths), T=next(lengths))
        yield Case("exp_product_scan", shape, dtype, dtype, gates, state, strided=strided, options=(("accum_dtype", accum),))
    for gates in ("long", "near 1"):
        shape = Shape(1, 1500, 3) if quick else Shape(1, 131072, 64)
        yield Case("exp_product_scan", shape, FP32, FP32, gates, options=(("accum_dtype", FP64),))
    yield Case("exp_product_scan", Shape(2, 65, 12), FP32, FP32, options=(("accum_dtype", FP32),), cotangents="last")


def _answer(item: tuple[str, Case | None, int]) -> list[Finding]:
    name, case, seed = item
    return check_truth(name, seed) if case is None else check(case)


def all_findings(names: Sequence[str], quick: bool, seed: int) -> list[Finding]:
    """Every case of the named operators. On a GPU in several processes: most of the time is compilation."""
    items: list[tuple[str, Case | None, int]] = [(name, None, seed) for name in names]
    items += [(case.operator, case, case.seed) for case in cases(names, quick, seed)]
    workers = 0 if device().type == "cpu" else min(12, os.cpu_count() or 1)
    found: list[Finding] = []
    for (name, case, _), answer in zip(items, map_in_processes(_answer, items, workers, seconds=120), strict=True):
        if isinstance(answer, Failure):
            dtype, options = (FP64, ()) if case is None else (case.dtype, case.options)
            label = f"the truth of {name}" if case is None else str(case)
            found.append(Finding(name, label, dtype, options, "(did not run)", True, float("inf"), 0.0, answer.reason))
        else:
            found += answer
    return found


def worst(findings: Sequence[Finding], timing: Timing, direction: str) -> float | None:
    """The largest relative error of an operator in a dtype: of outputs for the forward, of gradients too for both directions."""
    options = tuple(timing.options.items())
    relative_limits = LIMIT.values()
    errors = [
        f.error
        for f in findings
        if f.operator == timing.operator and f.dtype == timing.dtype and (f.of_output or direction != "fwd") and f.limit in relative_limits
        if not options or f.options == options
    ]
    return max(errors, key=lambda error: error if error == error else float("inf")) if errors else None
