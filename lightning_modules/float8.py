"""The large products of a network in FP8, by torchao."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.optimizers import import_torchao
from mmrec.blocks.mm_rec_block import MMRecBlock
from mmrec.model import MMRecModel

ALIGNMENT = 16  # what the FP8 products need: sizes in multiples of it
LEAST_CAPABILITY = (8, 9)  # Ada and Hopper


def float8_linears(network: MMRecModel) -> dict[str, nn.Linear]:
    """The layers that run in FP8, by name: a block's projections, `W_o` and both products of the feed-forward half.

    Not the decay's MLPs, the planning projections and the head: small, or too sensitive.
    """
    chosen = {}
    for name, module in network.named_modules():
        if isinstance(module, MMRecBlock):
            parts = {"projections": module.projections, "W_o": module.W_o, "ffn": module.ffn}
            for part_name, part in parts.items():
                for inner, linear in part.named_modules(prefix=f"{name}.{part_name}"):
                    if isinstance(linear, nn.Linear):
                        chosen[inner] = linear
    return chosen


def check_float8(network: MMRecModel, device: torch.device, precision: str) -> None:
    """Raise ValueError where FP8 cannot run: precision, device, or a width that is no multiple of 16."""
    if not precision.startswith("bf16"):
        raise ValueError(f"model.fp8 needs bf16 around its products, not trainer.precision={precision}; set it to bf16-mixed or bf16-true")
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if capability is None or capability < LEAST_CAPABILITY:
        found = "the CPU has none" if capability is None else f"this one's is {capability[0]}.{capability[1]}"
        raise ValueError(f"model.fp8 needs a GPU of compute capability 8.9 or above, {found}; set model.fp8=false")
    for name, linear in float8_linears(network).items():
        if linear.in_features % ALIGNMENT or linear.out_features % ALIGNMENT:
            sizes = f"{linear.in_features} → {linear.out_features}"
            raise ValueError(f"model.fp8 needs widths in multiples of {ALIGNMENT}, {name} is {sizes}; change model.network")


def check_float8_batch(input_ids: Tensor) -> None:
    """Raise ValueError where a batch's tokens, which the weights' gradients sum over, are no multiple of 16."""
    if input_ids.numel() % ALIGNMENT:
        shape = tuple(input_ids.shape)
        raise ValueError(f"model.fp8 needs tokens of a batch in multiples of {ALIGNMENT}, it is {shape}; change data.batch_size or seq_len")


def convert_to_float8(network: MMRecModel, config: Any = None) -> None:
    """Replace `float8_linears` in place by torchao's, which share their parameters; names in the state dict stay.

    Scales are dynamic, one a tensor. To be done before `torch.compile`, without which casting costs more than the products gain.

    Args:
        network: the network, checked by `check_float8`.
        config: torchao's Float8LinearConfig; None for its default.
    """
    import_torchao("model.fp8")
    from torchao.float8 import convert_to_float8_training

    chosen = float8_linears(network).keys()
    convert_to_float8_training(network, module_filter_fn=lambda module, name: name in chosen, config=config)
