"""AdamW with moments of 8 bits: the kernel against the map's own values, against float64, and what its rounding keeps."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_tools import SHARED_MEMORY, compiled_for
from support import assert_same
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_modules.gradients import clip_gradients
from lightning_modules.optimizers import make_optimizer
from mmrec.ops import launching
from mmrec.ops.adamw_8bit import BLOCK, Moment, adamw_8bit_, adamw_naive, dequantize_naive, quantize_naive, step_numbers, step_seed
from mmrec.ops.adamw_8bit.kernels import step_kernel
from mmrec.ops.adamw_8bit.naive import dynamic_map

BETAS, EPS = (0.9, 0.95), 1e-8
WHERE = [pytest.param("cpu", marks=pytest.mark.interpreted, id="interpreted"), pytest.param("cuda", marks=pytest.mark.gpu, id="gpu")]
on_both = pytest.mark.parametrize("device", WHERE)


def step(weight: Tensor, gradient: Tensor, first: Moment, second: Moment, rate: float = 0.0, decay: float = 0.0, **options: Any) -> None:
    """The first step and the seed 5 unless others are given."""
    numbers = step_numbers(rate, options.pop("betas", BETAS), EPS, decay, options.pop("number", 1), weight.device)
    seed = torch.tensor(options.pop("seed", 5), dtype=torch.int32, device=weight.device)
    adamw_8bit_(weight, gradient, first, second, numbers, seed, **{"salt": 1, "stochastic": True} | options)


def moments(first: Tensor, second: Tensor) -> tuple[Moment, Moment]:
    """Both in 8 bits."""
    (codes, scale), (codes2, scale2) = quantize_naive(first, True), quantize_naive(second, False)
    return Moment(codes, scale.float()), Moment(codes2, scale2.float())


def passed_through(first: Moment, second: Moment) -> None:
    """With a β that rounds to 1 in fp32 a step changes no moment: it decodes and encodes."""
    weight = torch.zeros(first.values.shape, device=first.values.device)
    step(weight, torch.zeros_like(weight), first, second, betas=(1 - 1e-9, 1 - 1e-9))


@on_both
def test_every_code_comes_back(device: str) -> None:
    codes = torch.arange(256, device=device).to(torch.uint8)
    first, second = (
        Moment(codes.clone(), torch.full((1,), 0.25, device=device)),
        Moment(codes.clone(), torch.full((1,), 3.0, device=device)),
    )
    passed_through(first, second)
    assert torch.equal(first.values, codes)
    assert torch.equal(second.values, codes)


@on_both
@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest(device: str, signed: bool) -> None:
    """Of values at and beside every half-way point between two neighbours, which rounding alone may decide, and of random ones."""
    values = dynamic_map(signed)
    half_way = ((values[1:] + values[:-1]) / 2)[None, :] * torch.tensor([[1 - 1e-4], [1 + 1e-4]], dtype=torch.float64)
    drawn = torch.rand(40, BLOCK - 1, dtype=torch.float64) * 10 ** (-7 * torch.rand(40, BLOCK - 1, dtype=torch.float64))
    rows = torch.cat([half_way, drawn * (2 * torch.randint(0, 2, drawn.shape) - 1 if signed else 1)])
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], 1).float().to(device)  # the largest of its block
    zeros = torch.zeros_like(rows)
    expected = moments(rows if signed else zeros, zeros if signed else rows)
    weight, floats = torch.zeros_like(rows), (rows if signed else zeros, zeros if signed else rows.sqrt())
    blank = moments(zeros, zeros)
    # β of 0 makes the gradient the first moment, and its square the second.
    step(weight, floats[0] if signed else floats[1], *blank, betas=(0.0, 0.0))
    found, wanted = (blank[0], expected[0]) if signed else (blank[1], expected[1])
    assert torch.equal(found.values, wanted.values)
    assert torch.allclose(found.scale, wanted.scale, rtol=1e-6)


@on_both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "number"), [((4096,), 1), ((37, 512), 7), ((3, 7), 7)], ids=str)
def test_a_step_equals_the_naive_one(device: str, dtype: torch.dtype, shape: tuple[int, ...], number: int) -> None:
    """Moments in 8 bits where blocks are whole, else as floats."""
    weight, gradient = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    first, second = 0.1 * torch.randn(shape, device=device), torch.rand(shape, device=device) + 0.1
    whole = weight.numel() % BLOCK == 0
    held = moments(first, second) if whole else (Moment(first, None), Moment(second, None))
    if whole:
        first, second = dequantize_naive(*held[0], signed=True), dequantize_naive(*held[1], signed=False)
    scale, before = torch.tensor(2.0, device=device), weight.double()
    expected, *after = adamw_naive(weight, gradient.double() / 2, first, second, number, 0.5, BETAS, EPS, 0.1)
    step(weight, gradient, *held, rate=0.5, decay=0.1, gradient_scale=scale, stochastic=False, number=number)
    digits = 1e-6 if dtype == torch.float32 else 2**-7  # the interpreter cuts bf16 off
    assert ((weight.double() - expected).abs() <= digits * expected.abs() + 1e-6).all()
    assert ((weight.double() - before).abs() > 4 * digits * expected.abs()).float().mean() > 0.5
    for signed, moment, value in zip((True, False), held, after, strict=True):
        if not whole:
            assert torch.allclose(moment.values.double(), value, rtol=1e-5, atol=1e-7)
            continue
        codes, scales = quantize_naive(value, signed)
        assert torch.allclose(moment.scale.double(), scales, rtol=1e-6)
        assert ((moment.values.int() - codes.int()) != 0).float().mean() < 1e-3  # where fp32 rounds over a half-way point
        assert (moment.values.int() - codes.int()).abs().max() <= 1


@on_both
def test_the_rounding_of_bf16_weights_keeps_the_mean(device: str) -> None:
    """A step of a hundredth of the last bit: one weight in a hundred moves, others for another seed or salt, the same ones for the same."""
    moved = []
    for options in ({}, {}, {"seed": 6}, {"salt": 2}):
        weight = torch.ones(256, BLOCK, dtype=torch.bfloat16, device=device)
        ones = torch.ones(256, BLOCK, device=device)
        step(weight, ones, *moments(0 * ones, 0 * ones), rate=2**-8 / 100, **options)  # below 1 bf16's values are 2^-8 apart
        assert set(weight.float().unique().tolist()) <= {1.0, 1 - 2**-8}
        assert ((1 - weight.float()).mean() / (2**-8 / 100)).item() == pytest.approx(1, abs=0.15)
        moved.append(weight < 1)
    assert torch.equal(moved[0], moved[1])
    for other in moved[2:]:
        assert (moved[0] & other).float().mean() < 1e-3  # independent: one in ten thousand


@pytest.mark.interpreted
def test_every_step_has_a_seed_of_its_own() -> None:
    seeds = [step_seed(number, torch.device("cpu")).item() for number in range(1, 20_000)]
    assert len(set(seeds)) == len(seeds)
    assert all((a ^ b) & 0xFF00FF00 for a, b in pairwise(seeds))


@on_both
def test_neither_nan_nor_infinity_is_rounded_away(device: str) -> None:
    weight = torch.ones(BLOCK, device=device).bfloat16()
    gradient = torch.zeros(BLOCK, device=device)
    gradient[3] = float("nan")
    weight[5] = float("inf")
    floats = (Moment(torch.zeros_like(gradient), None), Moment(torch.zeros_like(gradient), None))
    step(weight, gradient, *floats, rate=1e-3)
    assert weight.isnan().nonzero().tolist() == [[3]]
    assert weight.isinf().nonzero().tolist() == [[5]]
    held = moments(torch.zeros(2, BLOCK, device=device), torch.ones(2, BLOCK, device=device))
    step(torch.ones(2, BLOCK, device=device), torch.stack([gradient, gradient.nan_to_num()]), *held, rate=1e-3)
    for moment in held:  # the block's other values are lost, and seen to be
        assert moment.scale is not None
        assert moment.scale.isnan().tolist() == [True, False]


@pytest.mark.interpreted
def test_what_does_not_fit_is_refused() -> None:
    weight = torch.zeros(2, BLOCK)
    held = moments(weight, weight)
    with pytest.raises(ValueError, match="not contiguous; give contiguous ones"):
        step(torch.zeros(BLOCK, 2).t(), weight, *held)
    with pytest.raises(ValueError, match=r"have the shapes .*\(3,\).*; give the same"):
        step(weight, torch.zeros(3), *held)
    with pytest.raises(ValueError, match="one moment has scales and the other has none; give both"):
        step(weight, weight, held[0], Moment(weight, None))
    with pytest.raises(ValueError, match=r"the weight is torch\.float64; give fp32 or bf16"):
        step(weight.double(), weight, *held)
    with pytest.raises(ValueError, match=r"torch\.uint8 with 1 scales; give uint8 codes, a scale for every 256"):
        step(weight, weight, held[0], Moment(held[1].values, held[1].scale[:1]))
    with pytest.raises(ValueError, match=r"torch\.float32 with 2 scales; give uint8 codes"):
        step(weight, weight, held[0], Moment(weight, held[1].scale))


def optimizers(shape: tuple[int, ...], name: str = "adamw_8bit", count: int = 2) -> tuple[list[torch.nn.Parameter], Any]:
    """Weights in groups of their own, the second without decay, and our optimiser."""
    weights = [torch.nn.Parameter(torch.randn(shape)) for _ in range(count)]
    groups = [{"params": [weight], "weight_decay": decay} for weight, decay in zip(weights, (0.1, 0.0), strict=True)]
    return weights, make_optimizer(name, groups, 1e-2, BETAS, EPS)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("name", "shape"),
    [("adamw_8bit", (4, BLOCK)), ("adamw_8bit", (4, 4 * BLOCK)), ("adamw_bf16", (4, 4 * BLOCK))],
    ids=["float moments", "8 bits", "the weights' dtype"],
)
def test_the_optimiser_steps_by_the_kernel(name: str, shape: tuple[int, ...]) -> None:
    """Three steps of two groups, clipped in the second; gradients are left alone, and a weight without one."""
    pytest.importorskip("torchao")
    (weight, other), optimizer = optimizers(shape, name)
    assert optimizer.divides_gradients()
    expected, first, second = weight.detach().double(), torch.zeros(shape), torch.zeros(shape)
    for number in (1, 2, 3):
        weight.grad = torch.randn(shape)
        before = other.detach().clone()
        norm = clip_gradients(optimizer, 0.5 if number == 2 else None, "norm")
        assert_same(norm, weight.grad.norm())
        scale = max(1.0, norm.item() / 0.5) if number == 2 else 1.0
        kept = weight.grad.clone()
        assert optimizer.step(lambda: 7) == 7
        assert torch.equal(weight.grad, kept)
        assert torch.equal(other, before)
        expected, first, second = adamw_naive(expected, kept.double() / scale, first, second, number, 1e-2, BETAS, EPS, 0.1)
        state = optimizer.state[weight]
        if state["exp_avg"].__class__.__name__ == "OptimState8bit":
            held = (state["exp_avg"], state["exp_avg_sq"])
            first, second = (dequantize_naive(moment.codes, moment.scale, moment.signed) for moment in held)
        assert_same(weight, expected, limit=1e-5)
        assert state["step"] == number
    assert (state["exp_avg"].__class__.__name__ == "OptimState8bit") == (name == "adamw_8bit" and shape[1] > BLOCK)
    assert not optimizer.state[other]


@pytest.mark.interpreted
def test_gradients_clipped_by_value_are_not_divided_again() -> None:
    pytest.importorskip("torchao")
    (weight, _), optimizer = optimizers((4, 4 * BLOCK))
    weight.grad = torch.randn_like(weight)
    clip_gradients(optimizer, 0.1, "norm")
    assert optimizer.grad_scale > 1
    clip_gradients(optimizer, 0.1, "value")
    assert optimizer.grad_scale is None
    assert weight.grad.abs().max() <= 0.1


@pytest.mark.interpreted
def test_sharded_weights_are_stepped_and_clipped(tmp_path: Path) -> None:
    """As FSDP2 holds them: the norm is the whole gradient's, and kernels get plain tensors."""
    pytest.importorskip("torchao")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        (weight, _), optimizer = optimizers((4, 4 * BLOCK))
        start, gradient = weight.detach().clone(), torch.randn_like(weight)
        shard = torch.nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(0)]))
        sharded = make_optimizer("adamw_8bit", [{"params": [shard], "weight_decay": 0.1}], 1e-2, BETAS, EPS)
        weight.grad, shard.grad = gradient, distribute_tensor(gradient.clone(), mesh, [Shard(0)])
        for one in (optimizer, sharded):
            clip_gradients(one, 0.5, "norm")
            one.step()
        assert_same(shard.to_local(), weight, limit=1e-6)
        assert not torch.equal(weight, start)
    finally:
        torch.distributed.destroy_process_group()


@on_both
@pytest.mark.parametrize(
    ("quantised", "shape"),  # of so few as the last no block is full: their moments are floats
    [(True, (4096,)), (True, (37, 512)), (False, (4096,)), (False, (37, 512)), (False, (3, 7))],
    ids=str,
)
def test_where_something_infinite_was_found_nothing_changes(device: str, quantised: bool, shape: tuple[int, ...]) -> None:
    weight, gradient = (torch.randn(shape, device=device) for _ in range(2))
    held = moments(weight, weight.abs()) if quantised else (Moment(weight.clone(), None), Moment(weight.abs(), None))
    all_of = [weight, *(part for moment in held for part in moment if part is not None)]
    before = [part.clone() for part in all_of]
    spoiled = gradient.clone()
    spoiled.view(-1)[5] = float("nan")
    options = {"rate": 0.5, "decay": 0.1, "gradient_scale": torch.tensor(float("nan"), device=device)}
    step(weight, spoiled, *held, found_inf=torch.ones((), device=device), **options)
    assert all(torch.equal(part, old) for part, old in zip(all_of, before, strict=True))
    step(weight, gradient, *held, rate=0.5, found_inf=torch.zeros((), device=device))
    assert not torch.equal(weight, before[0])


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("quantised", [True, False])
def test_the_kernel_compiles(architecture: int, quantised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(launching, "launch", lambda kernel, tensors, prepare, *_: calls.append((tensors, prepare())))
    weight = torch.zeros(8, BLOCK, dtype=torch.bfloat16)
    held = moments(weight.float(), weight.float()) if quantised else (Moment(weight, None), Moment(weight, None))
    step(weight, weight, *held, gradient_scale=torch.tensor(1.0), found_inf=torch.tensor(0.0))
    ((tensors, call),) = calls
    assert compiled_for(architecture, step_kernel, (*tensors, *call.numbers), call.named).metadata.shared <= SHARED_MEMORY[architecture]
