"""What a baseline carries from token to token, in bytes: beside `mmrec.core.memory.state_bytes`."""

from mmrec.baselines.config import BaselineConfig

_WIDE, NARROW = 4, 2  # bytes of a number: recurrent states are fp32, keys, values and convolutions' inputs bf16
_CONVOLUTION = 4  # tokens that a short convolution of flash-linear-attention keeps


def state_bytes(config: BaselineConfig, batch_size: int, length: int) -> int:
    """Bytes for `batch_size` sequences after `length` tokens: of keys and values, which grow with it, or of a state that does not."""
    width, heads = config.model_dim, config.num_heads
    if config.kind == "transformer++":
        of_a_layer = NARROW * 2 * length * width
    elif config.kind == "gated-deltanet":  # heads of 3D/4H keys by 3D/2H values; both and the queries pass a convolution
        of_a_layer = _WIDE * (3 * width // 4) * (3 * width // (2 * heads)) + NARROW * _CONVOLUTION * 3 * width
    else:  # GLA: heads of D/2H keys by D/H values
        of_a_layer = _WIDE * (width // 2) * (width // heads)
    return batch_size * config.num_layers * of_a_layer
