"""A step of AdamW whose moments are held in 8 bits, in one pass over memory."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmrec.ops.adamw_8bit.naive import BLOCK, adamw_naive, dequantize_naive, quantize_naive

__all__ = ["BLOCK", "Moment", "adamw_8bit_", "adamw_naive", "dequantize_naive", "quantize_naive", "step_numbers", "step_seed"]


class Moment(NamedTuple):
    """One of AdamW's two moments.

    Attributes:
        values: of the weight's shape, contiguous; uint8 codes of the dynamic map, or floats.
        scale: (elements / 256,) fp32, what each block of 256 codes is multiplied by; None: `values` are floats.
    """

    values: Tensor
    scale: Tensor | None


def step_numbers(
    learning_rate: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int, device: torch.device
) -> Tensor:
    """What a step, numbered from 1, multiplies by, (6,) fp32 on `device`, which is not waited for."""
    unbiased = (learning_rate / (1 - betas[0] ** step), (1 - betas[1] ** step) ** -0.5)
    # 1 − β here, in double precision: of a β near 1 fp32 leaves few digits to it.
    numbers = torch.tensor((1 - learning_rate * weight_decay, 1 - betas[0], 1 - betas[1], eps, *unbiased), dtype=torch.float32)
    return _on(device, numbers)


def step_seed(step: int, device: torch.device) -> Tensor:
    """The seed of a step's rounding, 0-dim int32 on `device`, which is not waited for: the same on all ranks, and after a resumption."""
    return _on(device, torch.tensor(step * 0x61C88647 % 2**32 - 2**31, dtype=torch.int32))  # all steps apart: the factor is odd


def _on(device: torch.device, tensor: Tensor) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def adamw_8bit_(
    weight: Tensor,
    gradient: Tensor,
    first: Moment,
    second: Moment,
    numbers: Tensor,
    seed: Tensor,
    *,
    salt: int,
    stochastic: bool,
    gradient_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Overwrite a weight and its moments with those after a step of AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), as a Triton kernel.

    Computed in fp32; moments of 8 bits are those of Dettmers et al. 2022 (arXiv:2110.02861) with the dynamic map of torchao's optimisers,
    whose states can be handed in and read on.

    Args:
        weight: contiguous, fp32 or bf16.
        gradient: of its shape, any float dtype; not changed.
        first, second: both of codes, or both of floats.
        numbers: from `step_numbers`.
        seed: 0-dim int32 on the weight's device, another for every step: `step_seed`'s.
        salt: what sets the random numbers of several weights of a step apart.
        stochastic: round a bf16 weight up or down by a chance that keeps the mean.
        gradient_scale: 0-dim fp32 on the device: the gradient is divided by it; None: by nothing.
        found_inf: 0-dim fp32 on the device: where it is not 0, nothing is changed; None: as 0.

    Raises:
        ValueError: for a weight that is not contiguous, or shapes, dtypes or devices that do not fit.
    """
    tensors = (weight, gradient, first.values, second.values)
    if not (weight.is_contiguous() and first.values.is_contiguous() and second.values.is_contiguous()):
        raise ValueError(f"adamw_8bit_: a weight of strides {weight.stride()} or its moments are not contiguous; give contiguous ones")
    if len({tensor.shape for tensor in tensors}) > 1:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ValueError(f"adamw_8bit_: weight, gradient and moments have the shapes {shapes}; give the same")
    if len({tensor.device for tensor in (*tensors, numbers, seed)}) > 1:
        raise ValueError(f"adamw_8bit_: tensors lie on several devices; move all to {weight.device}")
    if weight.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"adamw_8bit_: the weight is {weight.dtype}; give fp32 or bf16")
    if (first.scale is None) != (second.scale is None):
        raise ValueError("adamw_8bit_: one moment has scales and the other has none; give both as codes, or both as floats")
    for moment in (first, second):
        if moment.scale is not None and (moment.values.dtype != torch.uint8 or moment.scale.numel() * BLOCK != weight.numel()):
            found = f"{moment.values.dtype} with {moment.scale.numel()} scales"
            raise ValueError(f"adamw_8bit_: a moment of {weight.numel()} elements is {found}; give uint8 codes, a scale for every {BLOCK}")
    from mmrec.ops.adamw_8bit.kernels import launch  # Triton exists on Linux alone

    moments = (first.values, first.scale, second.values, second.scale)
    random = stochastic and weight.dtype == torch.bfloat16
    launch(weight, gradient.contiguous(), *moments, numbers, seed, gradient_scale, found_inf, salt, random)
