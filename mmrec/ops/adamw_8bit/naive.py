"""The 8-bit moments of AdamW and a step with them, in plain PyTorch: the ground truth of the kernel.

Moments in 8 bits with a scale for each block and the dynamic map are Dettmers et al. 2022 (arXiv:2110.02861), the map and the block as
torchao has them; AdamW is Loshchilov & Hutter 2019 (arXiv:1711.05101).
"""

import torch
from torch import Tensor

BLOCK = 256  # elements that share a scale


def dynamic_map(signed: bool) -> Tensor:
    """The 256 values in rising order, float64: decades of 1, 2, 4 … 64 values (unsigned twice as many), 0 and 1."""
    values = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade if signed else 2 ** (decade + 1)
        magnitudes = [10.0 ** (decade - 6) * (0.1 + 0.9 * (j + 0.5) / count) for j in range(count)]
        values += magnitudes + ([-m for m in magnitudes] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float64)


def dequantize_naive(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """uint8 codes (…) of whole blocks and their scales (blocks,) to float64 of the codes' shape."""
    values = dynamic_map(signed).to(codes.device)[codes.long()]
    return (values.view(-1, BLOCK) * scale.double()[:, None]).view(codes.shape)


def quantize_naive(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The nearest codes, uint8, and the scales, float64: the largest magnitude of each block, 1e-12 at least."""
    rows = x.double().view(-1, BLOCK)
    scale = rows.abs().amax(1).clamp(min=1e-12)
    values = dynamic_map(signed).to(x.device)
    codes = torch.searchsorted((values[1:] + values[:-1]) / 2, rows / scale[:, None], right=True)
    return codes.to(torch.uint8).view(x.shape), scale


def adamw_naive(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    step: int,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and moments after step number `step`, from 1, in float64."""
    weight, gradient, first, second = (tensor.double() for tensor in (weight, gradient, first, second))
    first = betas[0] * first + (1 - betas[0]) * gradient
    second = betas[1] * second + (1 - betas[1]) * gradient.square()
    unbiased = (first / (1 - betas[0] ** step), second / (1 - betas[1] ** step))
    weight = weight * (1 - learning_rate * weight_decay)
    return weight - learning_rate * unbiased[0] / (unbiased[1].sqrt() + eps), first, second
