"""What is particular to one operator: strong decays, accumulation, grouped gates, head widths, steep gates."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CPU, CPU_LOW, GATED, GPU, GPU_LOW, INTERPRETED, INTERPRETED_LOW, MEMORY, Setting, gradients, in_float64, in_settings
from support import TOLERANCE, assert_same
from tiles import small_tiles
from torch import Tensor

from mmrec.ops import exp_product_scan, gated_scan, memory_scan, segments
from mmrec.ops.exp_product_scan import exp_product_scan_naive
from mmrec.ops.gated_scan import kernels as gated_kernels
from mmrec.ops.gated_scan.pytorch import gated_scan_gradients
from mmrec.ops.memory_scan import chaining, memory_scan_naive
from mmrec.ops.tuning import overridden

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@in_settings([(CPU_LOW[0], 20000), (GPU, 20000)])
def test_decays_are_summed_in_the_dtype_asked_for(setting: Setting, time: int) -> None:
    log_gamma = torch.full((1, time, 1), -1e-4, device=setting.device)
    exact = torch.exp(torch.tensor(-1e-4, dtype=torch.float32).double() * time).item()
    in_double = exp_product_scan(log_gamma, accum_dtype=torch.float64)[0][0, -1, 0].item()
    in_single = exp_product_scan(log_gamma)[0][0, -1, 0].item()
    assert abs(in_double / exact - 1) < 2e-7
    assert abs(in_single / exact - 1) < 1e-4
    with pytest.raises(ValueError, match="accum_dtype"):
        exp_product_scan(log_gamma, accum_dtype=torch.bfloat16)


@pytest.mark.parametrize("strength", [1e-4, 0.05, 1.0, 13.8])
@in_settings([(CPU_LOW[0], 300), (INTERPRETED, 50), (GPU, 4097)])
def test_products_summed_in_float64_are_exact_to_fp32(setting: Setting, time: int, strength: float) -> None:
    """Entry by entry: 1e-6 of the value, down to 1e-30."""
    log_gamma = -strength * torch.rand(2, time, 12).to(setting.device)
    y0 = torch.randn(2, 12).to(setting.device)
    expected, expected_last = exp_product_scan_naive(log_gamma.double(), y0.double())
    outputs, grads = gradients(lambda **leaves: exp_product_scan(**leaves, accum_dtype=torch.float64), {"log_gamma": log_gamma, "y0": y0})
    _, expected_grads = gradients(exp_product_scan_naive, {"log_gamma": log_gamma.double(), "y0": y0.double()})
    for actual, exact in ((outputs[0], expected), (outputs[1], expected_last)):
        error = (actual.detach().double() - exact).abs()
        assert (error <= torch.where(exact.abs() > 1e-30, 1e-6 * exact.abs(), 1e-30)).all()
    for name in grads:
        assert_same(grads[name], expected_grads[name], what=name)


@in_settings([(CPU_LOW[0], 200), (INTERPRETED, 40), (GPU, 200), (GPU_LOW[0], 200)])
def test_strong_decay_overflows_nowhere(setting: Setting, time: int) -> None:
    """At −5 a token a chunk spans e^320: a quotient of cumulative products would be inf · 0."""
    inputs = MEMORY.draw(setting, time)
    inputs["log_alpha"].fill_(-5.0)
    outputs, grads = gradients(MEMORY.op, inputs)
    expected, _ = memory_scan_naive(**in_float64(inputs))
    assert_same(outputs[0], expected)
    for name, gradient in grads.items():
        assert gradient.isfinite().all(), name


WIDTHS_ON_A_GPU = [(4, 6), (64, 64), (96, 160), (256, 256), (512, 512)]  # keys and values


@in_settings(
    [
        *((CPU_LOW[0].resized(K=K, V=V), 70) for K, V in [(4, 6), (20, 36)]),
        *((INTERPRETED.resized(B=1, H=1, K=K, V=V), 21) for K, V in [(20, 36), (36, 4)]),
        *((setting.resized(K=K, V=V), 300) for setting in (GPU, *GPU_LOW[:2]) for K, V in WIDTHS_ON_A_GPU),
    ]
)
def test_heads_of_any_width_and_a_scale(setting: Setting, time: int) -> None:
    inputs, reset = MEMORY.draw(setting, time), MEMORY.reset(setting, time)
    inputs["k"] *= setting.sizes["K"] ** -0.5
    outputs, grads = gradients(MEMORY.op, inputs, reset, scale=0.3)
    expected_outputs, expected_grads = gradients(MEMORY.naive, in_float64(inputs), reset, scale=0.3)
    for actual, expected, limit in zip(outputs, expected_outputs, MEMORY.output_limits(setting), strict=True):
        assert_same(actual, expected, limit=limit)
    for name in inputs:
        assert_same(grads[name], expected_grads[name], limit=MEMORY.gradient_limit(setting), what=f"gradient to {name}")


@in_settings([(INTERPRETED, 37), (INTERPRETED_LOW[0], 37)])
def test_the_memory_walks_and_reads_in_one_kernel(setting: Setting, time: int) -> None:
    inputs, reset = MEMORY.draw(setting, time), MEMORY.reset(setting, time)
    with overridden(**small_tiles(fused=1)):
        outputs, grads = gradients(MEMORY.op, inputs, reset)
    expected_outputs, expected_grads = gradients(MEMORY.naive, in_float64(inputs), reset)
    for actual, expected, limit in zip(outputs, expected_outputs, MEMORY.output_limits(setting), strict=True):
        assert_same(actual, expected, limit=limit)
    for name in inputs:
        assert_same(grads[name], expected_grads[name], limit=MEMORY.gradient_limit(setting), what=f"gradient to {name}")


@pytest.mark.parametrize("given", ["all", "neither state nor reset", "slices of a wider tensor", "the last state alone"])
@in_settings([(INTERPRETED, 40), (INTERPRETED.resized(B=1), 24), (GPU, 4096), (GPU_LOW[0], 4096), (GPU_LOW[0].resized(B=1, H=2), 8192)])
def test_segments_of_the_memory_side_by_side(setting: Setting, time: int, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sequences of few heads: states into and out of every segment, documents that start in some of them, views that cannot be cut."""
    if setting is not GPU and setting.device == "cpu":
        monkeypatch.setattr(segments, "LEAST", 6)
    monkeypatch.setattr(chaining, "_WORTH", 4)
    found = []
    right = chaining.count
    monkeypatch.setattr(chaining, "count", lambda *arguments: found.append(right(*arguments)) or found[-1])
    inputs, reset = MEMORY.draw(setting, time), MEMORY.reset(setting, time, share=2 / time)
    inputs["k"] *= setting.sizes["K"] ** -0.5
    if given == "neither state nor reset":
        inputs.pop("M0")
        reset = None
    if given == "slices of a wider tensor":
        inputs["v"] = torch.cat([inputs["v"], inputs["v"]], dim=-1)[..., : setting.sizes["V"]]

    def run(function: Callable[..., tuple[Tensor, Tensor]], values: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        if given != "the last state alone":
            return gradients(function, values, reset)
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in values.items()}
        last = function(**leaves, reset=reset)[1]
        last.square().sum().backward()
        return [last.detach()], {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items()}

    outputs, grads = run(MEMORY.op, inputs)
    expected_outputs, expected_grads = run(memory_scan_by_segments, in_float64(inputs))
    for actual, expected in zip(outputs, expected_outputs, strict=True):
        assert_same(actual, expected, limit=max(1e-4, TOLERANCE[setting.dtype]))
    for name in inputs:
        assert_same(grads[name], expected_grads[name], limit=MEMORY.gradient_limit(setting), what=f"gradient to {name}")
    assert min(found) >= 4


def memory_scan_by_segments(**inputs: Any) -> tuple[Tensor, Tensor]:
    """The truth; where a loop over single tokens would take minutes, the PyTorch form, which other tests hold against it."""
    return memory_scan_naive(**inputs) if inputs["q"].shape[1] < 100 else memory_scan(**inputs)


@pytest.mark.parametrize("given", ["all", "neither state nor reset", "the last state alone"])
@pytest.mark.parametrize("groups", [1, 3])
@in_settings([(INTERPRETED, 40), (INTERPRETED.resized(B=1), 36), (GPU.resized(B=1, D=96), 8192), (GPU_LOW[0].resized(D=96), 4096)])
def test_segments_of_the_adjoint_side_by_side(
    setting: Setting, time: int, groups: int, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long sequences of few channels, backward: adjoints handed from segment to segment, documents that start in some of them."""
    if setting.device == "cpu":
        monkeypatch.setattr(segments, "LEAST", 9)
    monkeypatch.setattr(gated_kernels, "WORTH", 4)
    found = []
    monkeypatch.setattr(gated_kernels, "count", lambda *arguments: found.append(segments.count(*arguments)) or found[-1])
    setting = setting.resized(P=setting.sizes["D"] // groups)
    inputs, reset = GATED.draw(setting, time, "near 1"), GATED.reset(setting, time, share=2 / time)
    if given == "neither state nor reset":
        inputs.pop("h0")
        reset = None

    def run(function: Callable[..., tuple[Tensor, Tensor]], values: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in values.items()}
        h, last = function(**leaves, reset=reset)
        loss = last.square().sum() + (
            0.0 if given == "the last state alone" else (h.double() * torch.arange(h.shape[1]).to(h).view(-1, 1)).sum()
        )
        loss.backward()
        return {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items()}

    actual = run(gated_scan, inputs)
    assert found[-1] >= 4
    expected = run(gated_scan, in_float64(inputs))
    for name in inputs:
        assert_same(
            actual[name], expected[name], limit=10 * TOLERANCE[setting.dtype] if setting.dtype == torch.float32 else 2e-2, what=name
        )


def test_sequences_are_cut_only_where_it_helps() -> None:
    whole = torch.randn(2, 8192, 4, 8)
    assert segments.count(8192, 8, 128, 4, (whole, None)) == 8
    assert segments.count(8192, 64, 128, 4, (whole,)) == 1  # enough to do
    assert segments.count(2048, 8, 128, 4, (whole[:, :2048],)) == 1  # too short
    assert segments.count(8191, 8, 128, 4, (whole[:, :-1],)) == 1  # no equal parts
    assert segments.count(4096, 8, 128, 4, (whole[:, :4096],)) == 1  # sequences lie apart
    assert segments.cut(whole, 4).data_ptr() == whole.data_ptr()
    assert torch.equal(segments.cut(whole[..., 1:3], 4), whole[..., 1:3].reshape(8, 2048, 4, 2))


@in_settings([(CPU, 500), (INTERPRETED, 50), (GPU, 500)])
def test_the_short_term_memory_stays_within_its_inputs(setting: Setting, time: int) -> None:
    """`u = (1 − γ) z` bounds |h| by max(|h0|, max|z|) for any length."""
    inputs = GATED.draw(setting, time, gates="near 1")
    inputs["w_g"] *= 50
    h, _ = gated_scan(**inputs)
    assert h.abs().max() <= max(inputs["h0"].abs().max(), inputs["z"].abs().max())


@pytest.mark.parametrize("width", [1, 2, 6, 12])
@in_settings([(CPU, 9), (INTERPRETED, 21), (GPU, 70)])
def test_gates_of_groups_of_channels(setting: Setting, time: int, width: int) -> None:
    """One gate for all channels, one a channel, and groups that a stripe holds whole or cuts."""
    setting = setting.resized(D=12 if setting.device == "cpu" else 768, P=width)
    inputs, reset = GATED.draw(setting, time), GATED.reset(setting, time)
    outputs, grads = gradients(GATED.op, inputs, reset)
    expected_outputs, expected_grads = gradients(GATED.naive, in_float64(inputs), reset)
    for actual, expected in zip(outputs, expected_outputs, strict=True):
        assert_same(actual, expected)
    for name in inputs:
        assert_same(grads[name], expected_grads[name], limit=GATED.gradient_limit(setting), what=f"gradient to {name}")


def jacobian_bound_inputs(setting: Setting, time: int, strength: float) -> dict[str, Tensor]:
    """Inputs with max |z·w_g|/4 = |strength| in every channel: above 1 a token may expand what it carries."""
    inputs = GATED.draw(setting, time)
    inputs["w_g"] = 4 * strength / inputs["z"].abs().amax((0, 1)).to(inputs["w_g"].dtype)
    return inputs


def assert_follows_the_formula(h: Tensor, inputs: dict[str, Tensor], reset: Tensor | None) -> None:
    """Each token against one application of the formula in float64 to the one before: trajectories themselves may be chaotic."""
    exact, h = in_float64(inputs), h.detach().double()
    previous = torch.cat([exact["h0"].unsqueeze(1), h[:, :-1]], dim=1)
    if reset is not None:
        previous = previous.masked_fill(reset.unsqueeze(-1), 0)
    gate = torch.sigmoid(exact["w_g"] * previous + exact["p"].repeat_interleave(h.shape[-1] // exact["p"].shape[-1], dim=-1))
    expected = -torch.expm1(exact["log_gamma"]) * exact["z"] * gate + exact["log_gamma"].exp() * previous
    # Newton stops at 1e-6 of the largest input; σ passes a quarter of what its argument, rounded to fp32, is off.
    largest = torch.maximum(exact["z"].abs().max(), exact["h0"].abs().max())
    assert (h - expected).abs().max() <= 1e-6 * largest * (2 + (exact["w_g"] * previous).abs().max() / 4)


STEEP = pytest.mark.parametrize("strength", [0.0, 1.0, -1.0, 5.0, -5.0, 20.0, -20.0, 100.0, -100.0])


@STEEP
@in_settings([(CPU_LOW[0], 70), (INTERPRETED, 21), (GPU, 130), (GPU, 4099)])
def test_steep_gates_are_exact_token_by_token(setting: Setting, time: int, strength: float) -> None:
    """Gradients too are held against those of the trajectory that came out."""
    inputs = jacobian_bound_inputs(setting.resized(B=1), time, strength)
    outputs, grads = gradients(GATED.op, inputs)
    assert_follows_the_formula(outputs[0], inputs, None)
    h, exact = outputs[0].detach().double(), in_float64(inputs)
    assert_same(outputs[1], h[:, -1])
    generator = torch.Generator().manual_seed(1)
    dh, dh_last = (torch.randn(o.shape, generator=generator).bfloat16().to(o.device).double() for o in outputs)
    values = gated_scan_gradients(dh, dh_last, h, *(exact[name] for name in ("z", "p", "log_gamma", "w_g", "h0")), None)
    # The slope of a steep gate multiplies the rounding of its argument.
    limit = TOLERANCE[torch.float32] * max(1.0, abs(strength))
    for (name, gradient), expected_gradient in zip(grads.items(), values, strict=True):
        assert_same(gradient, expected_gradient, limit=limit, what=f"gradient to {name}")


@STEEP
@in_settings([(INTERPRETED, 37), (GPU, 2049)])
def test_newton_over_time_equals_the_loop(setting: Setting, time: int, strength: float) -> None:
    """Where it cannot converge a tile is run token by token, and counted."""
    from mmrec.ops.gated_scan.kernels import newton_scan

    setting = setting.resized(B=1)
    inputs, reset = jacobian_bound_inputs(setting, time, strength), GATED.reset(setting, time)
    h, last, counts = newton_scan(*inputs.values(), reset)
    fallen_back, iterations = counts[:, 0], counts[:, 1]
    assert iterations.min() > 0
    if abs(strength) <= 1:
        assert fallen_back.sum() == 0
    assert_follows_the_formula(h, inputs, reset)
    assert_same(last, h[:, -1])


def test_a_gate_path_that_does_not_divide_is_refused() -> None:
    inputs = GATED.draw(CPU, 3)
    inputs["p"] = torch.randn(2, 3, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="P = 5 does not divide D = 12"):
        gated_scan(**inputs)
