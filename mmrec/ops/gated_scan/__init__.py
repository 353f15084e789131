"""MM-Rec's core formula: a nonlinear, elementwise recurrence."""

from torch import Tensor

from mmrec.ops.common import check_scan_inputs, check_shape
from mmrec.ops.gated_scan.naive import gated_scan_naive
from mmrec.ops.gated_scan.operator import gated_scan_op

__all__ = ["gated_scan", "gated_scan_naive"]


def gated_scan(
    z: Tensor, p: Tensor, log_gamma: Tensor, w_g: Tensor, h0: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`h_t = (1 − γ_t) z_t σ(w_g h_{t-1} + p̄_t) + γ_t h_{t-1}`, with `p̄` = `p` repeated over groups of D/P neighbouring channels.

    Args:
        z: (B, T, D), what is written, any float dtype.
        p: (B, T, P), when it is written; P divides D.
        log_gamma: (B, T, D), log-decays < 0, fp32 or bf16; the write factor 1 − γ is formed inside.
        w_g: (D,), how the state itself gates the write.
        h0: (B, D) fp32, the state before the first token; None means zero.
        reset: (B, T) boolean; where true the state is zero before the token enters.

    Returns:
        `h` (B, T, D) in the dtype of `z`, and `h_last` (B, D) in fp32 (float64 for float64 inputs).

    Raises:
        ValueError: for T = 0, a wrong shape, or P that does not divide D.
    """
    check_scan_inputs("gated_scan", z, reset)
    batch, time, channels = z.shape
    check_shape("gated_scan", "log_gamma", log_gamma, (batch, time, channels))
    check_shape("gated_scan", "w_g", w_g, (channels,))
    check_shape("gated_scan", "p", p, (batch, time, p.shape[-1]))
    if p.shape[-1] == 0 or channels % p.shape[-1]:
        raise ValueError(f"gated_scan: P = {p.shape[-1]} does not divide D = {channels}; choose a divisor")
    if h0 is not None:
        check_shape("gated_scan", "h0", h0, (batch, channels))
    output: tuple[Tensor, Tensor] = gated_scan_op(z, p, log_gamma, w_g, h0, reset)
    return output
