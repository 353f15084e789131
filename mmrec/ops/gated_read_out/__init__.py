"""What a block lets out: both memories normed a head, weighted a channel, gated."""

from torch import Tensor

from mmrec.ops.common import check_scan_inputs, check_shape
from mmrec.ops.gated_read_out.naive import gated_read_out_naive
from mmrec.ops.gated_read_out.operator import gated_read_out_op

__all__ = ["gated_read_out", "gated_read_out_naive"]


def gated_read_out(r: Tensor, h: Tensor, e: Tensor, g_r: Tensor, g_h: Tensor, eps: float) -> Tensor:
    """`σ(e) ⊙ (g_r ⊙ RMSNorm_head(r) + g_h ⊙ RMSNorm_head(h))`, the norms over a head's width, in fp32.

    Args:
        r, h: (B, T, H, K), what the long- and the short-term memory give; any float dtype and strides.
        e: (B, T, H, K), logits of the output gate.
        g_r, g_h: (H, K), gains.
        eps: added to the mean square.

    Returns:
        (B, T, H, K), contiguous, in the dtype of `e`.

    Raises:
        ValueError: for T = 0 or a wrong shape.
    """
    check_scan_inputs("gated_read_out", r, None, ndim=4)
    for name, tensor in (("h", h), ("e", e)):
        check_shape("gated_read_out", name, tensor, tuple(r.shape))
    for name, tensor in (("g_r", g_r), ("g_h", g_h)):
        check_shape("gated_read_out", name, tensor, tuple(r.shape[2:]))
    output: Tensor = gated_read_out_op(r, h, e, g_r, g_h, eps)
    return output
