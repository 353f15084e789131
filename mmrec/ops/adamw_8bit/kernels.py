"""The Triton kernel of `adamw_8bit_`: weight, gradient and both moments of a tensor are read once and written once.

The 256 values of the dynamic map (see `naive.py`) are never looked up. In a decade of 2^e values, e = 0 … top, the n-th of all magnitudes
is n = 2^e + j, so that the exponent and the fraction of n as a float are e and j / 2^e, and the other way round.
"""

import triton
import triton.language as tl
from torch import Tensor

from mmrec.ops import launching
from mmrec.ops.adamw_8bit.naive import BLOCK
from mmrec.ops.launching import Call, blocks

_ROWS, _WARPS = 8, 4  # blocks of a program
_LOG2_OF_10: tl.constexpr = tl.constexpr(3.321928094887362)


@triton.jit
def _float(n, OFFSET: tl.constexpr):
    """n − OFFSET as fp32, for 0 ≤ n < 2^23: as the last bits of 2^23 + n. A GPU converts numbers at an eighth of the rate of additions."""
    return (n | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + OFFSET)


@triton.jit
def decoded(n, TOP: tl.constexpr, LEAST: tl.constexpr):
    """Magnitudes by their number: 10^(e − top) · (0.1 + 0.9 (j + ½) / 2^e); the first is 0, the last 1."""
    number = _float(n, 0)
    exponent = number.to(tl.int32, bitcast=True) >> 23  # e + 127
    step = ((254 - exponent) << 23).to(tl.float32, bitcast=True)  # 2^−e
    decade = tl.exp2(_float(exponent, 127 + TOP) * _LOG2_OF_10)
    value = decade * (number * step * 0.9 + (step * 0.45 - 0.8))
    value = tl.where(n == 2 << TOP, 1.0, value)
    return tl.where(n == LEAST, 0.0, value)


@triton.jit
def encoded(y, TOP: tl.constexpr, LEAST: tl.constexpr):
    """The number of the magnitude that is nearest to y, 0 ≤ y ≤ 1."""
    # The exponent of y times log₁₀ 2 gives its decade, or the one below.
    e = (((y.to(tl.int32, bitcast=True) >> 23) - 127) * 78913 >> 18) + (TOP + 1)
    e = tl.minimum(tl.maximum(e, LEAST), TOP)
    u = y * tl.exp2(_float(TOP - e, 0) * _LOG2_OF_10)
    beyond = (u >= 1.0) & (e < TOP)
    e = tl.where(beyond, e + 1, e)
    u = tl.where(beyond, u * 0.1, u)  # 0.1 … 1 within its decade
    values = ((127 + e) << 23).to(tl.float32, bitcast=True)  # 2^e
    step = ((127 - e) << 23).to(tl.float32, bitcast=True)
    # Rounded by being added to 2^23, to the part that holds u, or on an edge between two parts to either.
    part = tl.minimum(tl.maximum((u - 0.1) * (values * (1.0 / 0.9)) - 0.5, 0.0), values - 1.0)
    j = (part + 8388608.0).to(tl.int32, bitcast=True) & 0xFF
    # A decade's first value has a coarser neighbour above than below: half-way down to that lies within its own share. Below all is 0.
    half_way_down = tl.where(e == LEAST, 0.05 + 0.225 * step, 0.1 + 0.18 * step)
    n = (1 << e) + j
    n = tl.where((j == 0) & (u < half_way_down), n - 1, n)
    return tl.where((e == TOP) & (u >= 1.0 - 0.225 * step), n + 1, n)


@triton.jit
def _uniform_16_bits(index, seed):
    """For every index a number below 2^16: the finaliser `lowbias32` (Wellons 2018), whose bits pass the tests a hash is put to."""
    x = index.to(tl.uint32) * 0x9E3779B1 + seed.to(tl.uint32)
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x & 0xFFFF


@triton.jit
def _rounded_at_random(value, index, seed):
    """fp32 to the bf16 value above or below, by a chance that is right in the mean."""
    bits = (value.to(tl.uint32, bitcast=True) + _uniform_16_bits(index, seed)) & 0xFFFF0000
    return tl.where(value == value, bits.to(tl.float32, bitcast=True), value)  # a NaN's bits could overflow into a number


@triton.jit(do_not_specialize=["salt", "count"])
def step_kernel(
    weight_ptr,
    gradient_ptr,
    first_ptr,
    first_scale_ptr,
    second_ptr,
    second_scale_ptr,
    numbers_ptr,
    seed_ptr,
    gradient_scale_ptr,
    found_inf_ptr,
    salt,
    count,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """ROWS blocks of WIDTH of `count` elements, all contiguous, weight fp32 or bf16. WHOLE: the last block is full.

    Where `found_inf` is not 0, nothing is read or written.

    Moments are uint8 codes with fp32 scales, one a block, or without scales floats as they are. `numbers` are `step_numbers`'.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offsets = rows[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    if found_inf_ptr is not None:
        count = tl.where(tl.load(found_inf_ptr) == 0.0, count, 0)
    whole = rows * WIDTH < count
    # Whether a block counts is one answer for all that a thread loads at once; of an element it would be one each, and a load each.
    inside = tl.broadcast_to(whole[:, None], [ROWS, WIDTH]) if WHOLE else offsets < count
    shrink = tl.load(numbers_ptr)
    new_share1 = tl.load(numbers_ptr + 1)
    new_share2 = tl.load(numbers_ptr + 2)
    eps = tl.load(numbers_ptr + 3)
    corrected_rate = tl.load(numbers_ptr + 4)
    correction2 = tl.load(numbers_ptr + 5)

    gradient = tl.load(gradient_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if gradient_scale_ptr is not None:
        gradient *= 1.0 / tl.load(gradient_scale_ptr)
    weight = tl.load(weight_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if first_scale_ptr is None:
        first = tl.load(first_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(second_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    else:
        code = tl.load(first_ptr + offsets, mask=inside, other=127).to(tl.int32) - 127
        first = tl.where(code < 0, -1.0, 1.0) * decoded(tl.abs(code), 6, 0)
        first *= tl.load(first_scale_ptr + rows, mask=whole, other=0.0)[:, None]
        second = decoded(tl.load(second_ptr + offsets, mask=inside, other=0).to(tl.int32) + 1, 7, 1)
        second *= tl.load(second_scale_ptr + rows, mask=whole, other=0.0)[:, None]

    first += new_share1 * (gradient - first)
    second += new_share2 * (gradient * gradient - second)
    weight = weight * shrink - corrected_rate * first / (tl.sqrt(second) * correction2 + eps)
    if STOCHASTIC:
        seed = tl.load(seed_ptr) ^ (salt * 0x2C1B3C6D)
        weight = _rounded_at_random(weight, offsets, seed)
    tl.store(weight_ptr + offsets, weight.to(weight_ptr.dtype.element_ty), mask=inside)
    if first_scale_ptr is None:
        tl.store(first_ptr + offsets, first.to(first_ptr.dtype.element_ty), mask=inside)
        tl.store(second_ptr + offsets, second.to(second_ptr.dtype.element_ty), mask=inside)
    else:
        # 0 times a sum is 0, or NaN where a maximum would pass over one: then the whole block is NaN, as everywhere else in torch.
        largest = tl.maximum(tl.max(tl.abs(first), 1), 1e-12) + 0.0 * tl.sum(first, 1)
        tl.store(first_scale_ptr + rows, largest, mask=whole)
        n = encoded(tl.abs(first) * (1.0 / largest)[:, None], 6, 0)
        code = tl.where(first < 0, 127 - tl.minimum(n, 127), 127 + n)  # the map has no −1
        tl.store(first_ptr + offsets, code.to(tl.uint8), mask=inside)
        largest = tl.maximum(tl.max(second, 1), 1e-12) + 0.0 * tl.sum(second, 1)
        tl.store(second_scale_ptr + rows, largest, mask=whole)
        n = encoded(second * (1.0 / largest)[:, None], 7, 1)
        tl.store(second_ptr + offsets, (n - 1).to(tl.uint8), mask=inside)


def launch(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    first_scale: Tensor | None,
    second: Tensor,
    second_scale: Tensor | None,
    numbers: Tensor,
    seed: Tensor,
    gradient_scale: Tensor | None,
    found_inf: Tensor | None,
    salt: int,
    stochastic: bool,
) -> None:
    """See `adamw_8bit_`; all but the last two contiguous tensors."""

    def prepare() -> Call:
        named = {"WIDTH": BLOCK, "ROWS": _ROWS, "WHOLE": weight.numel() % BLOCK == 0, "STOCHASTIC": stochastic, "num_warps": _WARPS}
        return Call((blocks(weight.numel(), BLOCK * _ROWS),), (salt, weight.numel()), named)

    tensors = (weight, gradient, first, first_scale, second, second_scale, numbers, seed, gradient_scale, found_inf)
    launching.launch(step_kernel, tensors, prepare, salt, stochastic)
