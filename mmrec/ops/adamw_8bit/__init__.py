"""A step of AdamW whose moments are held in 8 bits, in one pass over memory."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmrec.ops.adamw_8bit.naive import BLOCK, adamw_naive, dequantize_naive, quantize_naive

__all__ = ["BLOCK", "Moment", "adamw_8bit_", "adamw_naive", "dequantize_naive", "quantize_naive", "step_numbers"]


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
    """What a step, numbered from 1, multiplies by, (7,) fp32 on `device`, which is not waited for."""
    unbiased = (learning_rate / (1 - betas[0] ** step), (1 - betas[1] ** step) ** -0.5)
    numbers = torch.tensor((learning_rate, weight_decay, *betas, eps, *unbiased), dtype=torch.float32)
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers


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
) -> None:
    """Overwrite a weight and its moments with those after a step of AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), as a Triton kernel.

    Computed in fp32; moments of 8 bits are those of Dettmers et al. 2022 (arXiv:2110.02861) with the dynamic map of torchao's optimisers,
    whose states can be handed in and read on.

    Args:
        weight: contiguous, fp32 or bf16.
        gradient: of its shape, any float dtype; not changed.
        first, second: both of codes, or both of floats.
        numbers: from `step_numbers`.
        seed: 0-dim int32 on the weight's device, a new random number for every step.
        salt: what sets the random numbers of several weights of a step apart.
        stochastic: round a bf16 weight up or down by a chance that keeps the mean.
        gradient_scale: 0-dim fp32 on the device: the gradient is divided by it; None: by nothing.

    Raises:
        ValueError: for a weight that is not contiguous, or shapes that do not fit.
    """
    if not (weight.is_contiguous() and first.values.is_contiguous() and second.values.is_contiguous()):
        raise ValueError(f"adamw_8bit_: a weight of strides {weight.stride()} or its moments are not contiguous; give contiguous ones")
    if not (weight.shape == gradient.shape == first.values.shape == second.values.shape):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (weight, gradient, first.values, second.values))
        raise ValueError(f"adamw_8bit_: weight, gradient and moments have the shapes {shapes}; give the same")
    if (first.scale is None) != (second.scale is None) or (first.scale is not None and weight.numel() % BLOCK):
        raise ValueError(f"adamw_8bit_: {weight.numel()} elements are no whole blocks of {BLOCK}, or one moment alone has scales")
    from mmrec.ops.adamw_8bit.kernels import launch  # Triton exists on Linux alone

    moments = (first.values, first.scale, second.values, second.scale)
    random = stochastic and weight.dtype == torch.bfloat16
    launch(weight, gradient.contiguous(), *moments, numbers, seed, gradient_scale, salt, random)
