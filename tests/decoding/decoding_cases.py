"""Networks to decode with, and what their steps should give."""

from typing import Any

import torch

from mmrec.core.memory import BlockState
from mmrec.decoding import Decoder
from mmrec.model import MMRecModel

VOCAB = 50
PRODUCTS = ("projection", "gates_in", "short_term", "out", "gate_up", "down", "head")
# Several tiles along rows and words, and tails of both, at widths that the interpreter gets through.
SMALL = {name: {"R": 16, "BW": 32, "num_warps": 1} for name in PRODUCTS} | {
    "memory": {"BV": 8, "num_warps": 1},
    "window": {"BN": 4, "num_warps": 1},
}


def network(**options: Any) -> MMRecModel:
    """A network in which every parameter matters: gains, biases and gates are drawn too."""
    defaults = {"vocab_size": VOCAB, "num_layers": 1, "ffn_dim": 40, "use_uboo": False, "initializer_range": 0.2}
    model = MMRecModel(**(defaults | options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith(("g_r", "g_h", "gain")):
                noise = 0.3 * torch.randn_like(parameter)
                if model.config.state_gate or not name.endswith("w_g"):  # it is frozen at 0
                    parameter.add_(noise)
    return model


def random_state(model: MMRecModel, batch: int) -> list[BlockState]:
    """A state as some text might have left it."""
    state = model.init_state(batch)
    for own in state:
        for tensor in own.kept():
            tensor.copy_(torch.randn_like(tensor) if tensor.is_floating_point() else torch.ones_like(tensor))
        if own.window is not None:
            own.window.log_alpha.abs_().neg_()
    return state


def tokens(model: MMRecModel, batch: int, steps: int) -> list[torch.Tensor]:
    """Random tokens for some steps."""
    device = model.embedding.weight.device
    return [torch.randint(model.config.vocab_size, (batch,), device=device) for _ in range(steps)]


@torch.inference_mode()
def stepped(model: MMRecModel, state: list[BlockState], given: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[BlockState]]:
    """The logits of every step by `model.step`, and the state after the last."""
    logits = []
    for token in given:
        one, state = model.step(token, state)
        logits.append(one)
    return logits, state


def decoded(decoder: Decoder, state: list[BlockState], given: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[BlockState]]:
    """The same by a decoder."""
    decoder.load(state)
    return [decoder.step(token).clone() for token in given], decoder.state
