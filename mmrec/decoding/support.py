"""What the fused step can run. Without its kernels: Triton exists on Linux alone."""

import torch

from mmrec.model import PLANNING_WEIGHTS, MMRecModel
from mmrec.ops.registration import runs_kernel

BATCH = 4  # sequences at most: beyond, a product's arithmetic takes longer than its weights
HEAD_WIDTH = 512
_DTYPES = (torch.float32, torch.bfloat16)
# fp32 whatever the rest is.
_WIDE = (".out_bias.bias", ".up_bias.bias", ".w_g", ".w_alpha", ".A_log", ".dt_bias", ".log_temperature", ".q_gain", ".k_gain")


def unsupported(model: MMRecModel, batch_size: int) -> str:
    """Why a token's step cannot run in these kernels; nothing where it can."""
    config = model.config
    weight = model.embedding.weight
    if not runs_kernel(weight, torch.float32):
        return f"the network lies on {weight.device}"
    if not config.use_hem:
        return "use_hem is false: six projections"
    if batch_size > BATCH:
        return f"{batch_size} sequences, more than {BATCH}"
    if config.head_dim > HEAD_WIDTH:
        return f"heads of {config.head_dim} channels, more than {HEAD_WIDTH}"
    if weight.dtype not in _DTYPES:
        return f"weights in {weight.dtype}"
    for name, parameter in model.named_parameters():
        if name.endswith(PLANNING_WEIGHTS):
            continue
        dtype = torch.float32 if name.endswith(_WIDE) else weight.dtype
        if parameter.dtype != dtype or parameter.device != weight.device or not parameter.is_contiguous():
            return f"{name} is {parameter.dtype} on {parameter.device}, or not contiguous"
        if parameter.shape[-1] * parameter.itemsize % 4 or parameter.data_ptr() % 4:
            return f"{name} has rows of {parameter.shape[-1]}: no whole words"
    return ""
