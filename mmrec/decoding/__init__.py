"""Fast decoding: a token's step as few kernels that read each weight once, replayed from one CUDA graph."""

from mmrec.decoding.decoder import Decoder

__all__ = ["Decoder"]
