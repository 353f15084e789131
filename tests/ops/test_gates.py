"""`gated_scan` from its gates' logits: one gate or two, saturated ones, bounds, segments, and the passes it does without."""

import math
from collections.abc import Callable

import pytest
import torch
from cases import (
    CPU,
    CPU_LOW,
    GATED_LOGITS,
    GPU,
    GPU_LOW,
    INTERPRETED,
    INTERPRETED_LOW,
    ONE_GATE,
    Case,
    Setting,
    gradients,
    in_float64,
    in_settings,
)
from recorded import detached, operator
from support import TOLERANCE, RecordedOperators, assert_same
from tiles import small_tiles
from torch import Tensor

from mmrec.ops import decay_log, gated_scan, gated_scan_from_logits, segments
from mmrec.ops.gated_scan import gated_scan_from_logits_naive
from mmrec.ops.gated_scan import kernels as gated_kernels
from mmrec.ops.tuning import overridden

pytestmark = pytest.mark.usefixtures("poisoned_memory")
one_or_two = pytest.mark.parametrize("case", [ONE_GATE, GATED_LOGITS], ids=["one gate", "two gates"])
Function = Callable[..., tuple[Tensor, Tensor]]


def assert_equal_to_the_loop(case: Case, setting: Setting, inputs: dict[str, Tensor], reset: Tensor | None, **bounds: float) -> None:
    outputs, grads = gradients(case.op, inputs, reset, **bounds)
    expected_outputs, expected_grads = gradients(case.naive, in_float64(inputs), reset, **bounds)
    for actual, expected in zip(outputs, expected_outputs, strict=True):
        assert_same(actual, expected)
    for name in inputs:
        assert grads[name].dtype == inputs[name].dtype
        assert_same(grads[name], expected_grads[name], limit=case.gradient_limit(setting), what=f"gradient to {name}")


@one_or_two
@pytest.mark.parametrize("given", ["all", "neither state nor reset"])
@in_settings(
    [
        *((setting, time) for setting in (CPU, *CPU_LOW) for time in (1, 9)),
        *((setting.resized(P=width), 19) for setting in (INTERPRETED, INTERPRETED_LOW[0]) for width in (1, 4, 12)),
        (INTERPRETED, 1),
        (INTERPRETED_LOW[1], 21),
        *((setting, time) for setting in (GPU, *GPU_LOW[:2]) for time in (1, 131, 2049)),
        *((GPU_LOW[0].resized(B=4, D=4096, P=width), 300) for width in (512, 4096)),
    ]
)
def test_one_gate_or_two(case: Case, given: str, setting: Setting, time: int) -> None:
    inputs, reset = case.draw(setting, time), case.reset(setting, time)
    if given != "all":
        inputs.pop("h0")
        reset = None
    assert_equal_to_the_loop(case, setting, inputs, reset)


@one_or_two
@in_settings([(CPU, 40), (CPU_LOW[0], 40), (INTERPRETED, 40), (INTERPRETED_LOW[0], 40), (GPU, 700), (GPU_LOW[0], 700)])
def test_between_narrow_bounds(case: Case, setting: Setting, time: int) -> None:
    """Many decays lie outside, and some close to a bound on either side of it."""
    low, high = -2.0, -0.05
    inputs = case.draw(setting, time)
    at = [bound / 2 if case is GATED_LOGITS else bound for bound in (low, high)]
    logits = torch.tensor([x - math.log(-math.expm1(x)) for x in at], dtype=setting.wide)
    beside = logits[:, None] + torch.tensor([-0.02, 0.02], dtype=setting.wide)
    for name in ("bias", "context_bias")[: 2 if case is GATED_LOGITS else 1]:
        inputs[name].zero_()
        inputs[name.replace("context_bias", "context").replace("bias", "logits")][:, ::2, :4] = beside.flatten().to(inputs["z"])
    assert_equal_to_the_loop(case, setting, inputs, case.reset(setting, time), low=low, high=high)


@one_or_two
@in_settings([(CPU, 30), (CPU_LOW[0], 30), (INTERPRETED, 30), (INTERPRETED_LOW[0], 30), (GPU, 700), (GPU_LOW[0], 700)])
def test_saturated_gates(case: Case, setting: Setting, time: int) -> None:
    """Logits far beyond ±100 of one gate or both: no infinity times zero, nothing that is not finite."""
    inputs = case.draw(setting, time)
    for name in ("logits", "context")[: 2 if case is GATED_LOGITS else 1]:
        inputs[name] *= 10.0 ** torch.randint(0, 5, inputs[name].shape).to(inputs[name])
        inputs[name][:, 0, :3] = torch.tensor([-3e4, 3e4, 0.0]).to(inputs[name])
        inputs[name][:, 1, :2] = torch.tensor([3e4, -3e4] if name == "logits" else [-3e4, 3e4]).to(inputs[name])
    assert_equal_to_the_loop(case, setting, inputs, case.reset(setting, time))


@in_settings([(INTERPRETED, 2), (GPU, 2)])
def test_nothing_hides_what_is_not_a_number(setting: Setting, time: int) -> None:
    inputs = GATED_LOGITS.draw(setting, time)
    inputs["logits"][0, 1, 2] = inputs["context"][1, 1, 3] = float("nan")
    h, _ = GATED_LOGITS.op(**inputs)
    expected = torch.zeros_like(h, dtype=torch.bool)
    expected[0, 1, 2] = expected[1, 1, 3] = True
    assert torch.equal(h.isnan(), expected)


@one_or_two
@in_settings([(CPU_LOW[0], 3), (INTERPRETED, 3), (GPU, 3), (INTERPRETED, 17), (GPU, 17)])
def test_decays_and_what_they_let_in_keep_their_digits(case: Case, setting: Setting, time: int) -> None:
    """Of γ and of 1 − γ, from 1e-6 to one part in a million less than 1: each is read off a scan that shows nothing else."""
    channels, low, high = 200, math.log(1e-6), -1e-6
    logits = torch.linspace(-13, 13.5, channels).expand(1, time, channels).to(setting.device)
    zeros, ones = torch.zeros(channels, device=setting.device), torch.ones_like(logits)
    gates = (logits, zeros, logits.flip(-1) + 6, zeros) if case is GATED_LOGITS else (logits, zeros, None, None)
    exact = torch.nn.functional.logsigmoid(logits.double())
    if case is GATED_LOGITS:
        exact = exact + torch.nn.functional.logsigmoid(gates[2].double())
    exact = exact.clamp(low, high)
    everywhere_new = torch.ones(1, time, dtype=torch.bool, device=setting.device)
    # An exponent of 19 rounded to fp32 is 7e-7; a GPU's ex2 and rcp add two units in the last place and one, twice.
    limit = 2e-6 if setting.device == "cuda" else 1e-6
    written, _ = gated_scan_from_logits(ones, 40 * ones, *gates, zeros, None, everywhere_new, low=low, high=high)
    assert (written.double() / -torch.expm1(exact) - 1).abs().max() < limit
    kept, _ = gated_scan_from_logits(0 * ones, ones, *gates, zeros, 1 + zeros[None], None, low=low, high=high)
    assert (kept[:, 0].double() / exact[:, 0].exp() - 1).abs().max() < limit


@one_or_two
@in_settings([(CPU, 30), (INTERPRETED, 30), (GPU, 700), (GPU_LOW[0], 700)])
def test_equals_the_two_operators(case: Case, setting: Setting, time: int) -> None:
    low, high = -1.5, -0.3

    def in_two(z, p, logits, bias, w_g, h0, context=None, context_bias=None, reset=None):
        return gated_scan(z, p, decay_log(logits, bias, context, context_bias, low=low, high=high), w_g, h0, reset)

    inputs, reset = case.draw(setting, time), case.reset(setting, time)
    outputs, grads = gradients(case.op, inputs, reset, low=low, high=high)
    expected_outputs, expected_grads = gradients(in_two, inputs, reset)
    for actual, expected in zip(outputs, expected_outputs, strict=True):
        assert_same(actual, expected)
    for name in inputs:
        assert_same(grads[name], expected_grads[name], limit=case.gradient_limit(setting), what=f"gradient to {name}")
    assert 0.05 < (grads["logits"] == 0).float().mean() < 0.95  # beyond the bounds no gradient passes
    differing = ((grads["logits"] == 0) != (expected_grads["logits"] == 0)).sum()
    assert differing <= 2  # within rounding of a bound


@pytest.mark.parametrize("given", ["all", "neither state nor reset"])
@one_or_two
@in_settings(
    [
        *((INTERPRETED, 40), (INTERPRETED.resized(B=1, P=12), 36)),
        *((GPU.resized(B=1, D=96, P=48), 8192), (GPU_LOW[0].resized(D=96, P=48), 4096)),
    ]
)
def test_segments_side_by_side(setting: Setting, time: int, case: Case, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sequences of few channels, whose segments end in the middle of a tile."""
    if setting.device == "cpu":
        monkeypatch.setattr(segments, "LEAST", 9)
    monkeypatch.setattr(gated_kernels, "WORTH", 4)
    found = []
    monkeypatch.setattr(gated_kernels, "count", lambda *arguments: found.append(segments.count(*arguments)) or found[-1])
    inputs, reset = case.draw(setting, time, "near 1"), case.reset(setting, time, share=2 / time)
    if given != "all":
        inputs.pop("h0")
        reset = None
    outputs, grads = gradients(case.op, inputs, reset)
    assert found[-1] >= 4
    expected_outputs, expected_grads = gradients(case.op, in_float64(inputs), reset)
    for actual, expected in zip(outputs, expected_outputs, strict=True):
        # Decays near 1 add the last digits of a GPU's ex2 and rcp up over thousands of tokens.
        limit = 10 * TOLERANCE[torch.float32] if setting.device == "cuda" and actual.dtype == torch.float32 else None
        assert_same(actual, expected, limit=limit)
    for name in inputs:
        assert_same(grads[name], expected_grads[name], limit=10 * TOLERANCE[torch.float32] if setting.dtype == torch.float32 else 2e-2)


@one_or_two
@in_settings([(INTERPRETED, 37), (INTERPRETED_LOW[0], 37), (GPU.resized(B=1), 4099), (GPU_LOW[0].resized(B=1), 4099)])
def test_long_sequences_of_few_channels_are_solved_by_newton(
    case: Case, setting: Setting, time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    newton = gated_kernels.newton_scan
    monkeypatch.setattr(gated_kernels, "newton_scan", lambda *arguments: ran.append(True) or newton(*arguments))
    inputs, reset = case.draw(setting, time), case.reset(setting, time)
    with overridden(**({} if setting.device == "cuda" else small_tiles(min_time=1))):
        outputs, _ = gradients(case.op, inputs, reset)
    assert ran
    for actual, expected in zip(outputs, case.op(**in_float64(inputs), reset=reset), strict=True):
        assert_same(actual, expected)


@pytest.mark.parametrize("with_state", [True, False], ids=["state", "no state"])
@in_settings([(CPU, 9), (INTERPRETED.resized(B=1), 21), (GPU, 130), (GPU_LOW[0], 700)])
def test_one_gate_in_a_callers_buffers(setting: Setting, time: int, with_state: bool) -> None:
    """Where there is no context there is no gradient to one; all others are slices of a buffer, of which nothing else is written."""
    inputs = ONE_GATE.draw(setting, time)
    if not with_state:
        inputs.pop("h0")
    with RecordedOperators() as recorded:
        outputs = ONE_GATE.op(**{name: tensor.requires_grad_() for name, tensor in inputs.items()}, reset=ONE_GATE.reset(setting, time))
        torch.autograd.backward(outputs, [torch.randn_like(output) for output in outputs])
    arguments = {name: tuple(detached(a) for a in args) for name, args in recorded.calls}
    backward = arguments["gated_scan_from_logits_bwd"]
    gradients_of_bwd = operator("gated_scan_from_logits_bwd")(*backward)
    assert len(gradients_of_bwd) == 6
    torch.library.opcheck(operator("gated_scan_from_logits_bwd"), backward)
    forward = arguments["gated_scan_from_logits"]
    differentiable = [a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in forward]
    torch.library.opcheck(operator("gated_scan_from_logits"), tuple(differentiable))

    wide = [gradient for gradient in gradients_of_bwd if gradient.ndim == 3]
    buffer = wide[0].new_full((*wide[0].shape[:2], sum(g.shape[2] + 1 for g in wide)), float("nan"))
    views, begin = [], 0
    for gradient in gradients_of_bwd:
        if gradient.ndim == 3:
            views.append(buffer[..., begin : begin + gradient.shape[2]])
            begin += gradient.shape[2] + 1
        else:
            views.append(torch.full_like(gradient, float("nan")))
    written = (*views[:4], None, None, *views[4:])
    torch.library.opcheck(operator("gated_scan_from_logits_bwd_out"), (*backward, *written))
    operator("gated_scan_from_logits_bwd_out")(*backward, *written)
    for view, gradient in zip(views, gradients_of_bwd, strict=True):
        assert torch.equal(view, gradient)
        view.fill_(float("nan"))
    assert buffer.isnan().all()


def test_wrong_gates_are_refused() -> None:
    inputs = GATED_LOGITS.draw(CPU, 3)
    for name in ("p", "logits", "bias", "context", "context_bias", "w_g"):
        with pytest.raises(ValueError, match=f"gated_scan_from_logits: ({name} has shape|P = 0)"):
            GATED_LOGITS.op(**{**inputs, name: inputs[name][..., :0]})
    with pytest.raises(ValueError, match="context and context_bias come together"):
        GATED_LOGITS.op(**{**inputs, "context": None})
    with pytest.raises(ValueError, match="P = 5 does not divide D = 12"):
        GATED_LOGITS.op(**{**inputs, "p": torch.randn(2, 3, 5, dtype=torch.float64)})


@in_settings([(CPU_LOW[1], 9), (INTERPRETED_LOW[0], 19), (GPU_LOW[0], 300)])
def test_gradients_have_the_dtypes_of_what_they_belong_to(setting: Setting, time: int) -> None:
    inputs = GATED_LOGITS.draw(setting, time)
    _, grads = gradients(GATED_LOGITS.op, inputs)
    _, expected = gradients(gated_scan_from_logits_naive, in_float64(inputs), low=math.log(1e-6), high=-1e-6)
    assert [grads[name].dtype for name in inputs] == [inputs[name].dtype for name in inputs]
    for name in ("bias", "context_bias", "w_g", "h0"):  # in fp32: what was rounded is the states they are formed from
        assert grads[name].dtype == torch.float32
        assert_same(grads[name], expected[name], limit=GATED_LOGITS.gradient_limit(setting))
