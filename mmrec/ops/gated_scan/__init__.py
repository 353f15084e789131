"""MM-Rec's core formula: a nonlinear, elementwise recurrence."""

from torch import Tensor

from mmrec.ops.common import check_scan_inputs, check_shape
from mmrec.ops.gated_scan.naive import gated_scan_from_logits_naive, gated_scan_naive
from mmrec.ops.gated_scan.operator import gated_scan_op
from mmrec.ops.gated_scan.operator_from_logits import gated_scan_from_logits_op

__all__ = ["gated_scan", "gated_scan_from_logits", "gated_scan_from_logits_naive", "gated_scan_naive"]


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
    _check("gated_scan", z, p, w_g, h0, reset)
    check_shape("gated_scan", "log_gamma", log_gamma, tuple(z.shape))
    output: tuple[Tensor, Tensor] = gated_scan_op(z, p, log_gamma, w_g, h0, reset)
    return output


def gated_scan_from_logits(
    z: Tensor,
    p: Tensor,
    logits: Tensor,
    bias: Tensor,
    context: Tensor | None,
    context_bias: Tensor | None,
    w_g: Tensor,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor]:
    """`gated_scan(z, p, decay_log(logits, bias, context, context_bias, low=low, high=high), w_g, h0, reset)`, without log γ in memory.

    Args:
        z, p, w_g, h0, reset: as `gated_scan` takes them.
        logits: (B, T, D), of the gate of γ, any float dtype and strides.
        bias: (D,) fp32, added to `logits`.
        context, context_bias: the same of a second gate, whose σ is multiplied to the first's; None: there is none.
        low, high: bounds of log γ, `low < high < 0`; beyond them no gradient passes to the gates. The kernels tell γ from 0 down to 2⁻⁶³ a
            gate: `low` is not to be less than −43.

    Returns:
        `h` (B, T, D) in the dtype of `z`, and `h_last` (B, D) in fp32 (float64 for float64 inputs).

    Raises:
        ValueError: for T = 0, a wrong shape, P that does not divide D, bounds out of range, or a context without its bias.
    """
    name = "gated_scan_from_logits"
    _check(name, z, p, w_g, h0, reset)
    check_shape(name, "logits", logits, tuple(z.shape))
    check_shape(name, "bias", bias, (z.shape[2],))
    if not -43 <= low < high < 0:
        raise ValueError(f"{name}: low is {low} and high {high}; give -43 <= low < high < 0")
    if (context is None) != (context_bias is None):
        raise ValueError(f"{name}: context and context_bias come together; give both or neither")
    if context is not None and context_bias is not None:
        check_shape(name, "context", context, tuple(z.shape))
        check_shape(name, "context_bias", context_bias, (z.shape[2],))
    output: tuple[Tensor, Tensor] = gated_scan_from_logits_op(z, p, logits, bias, context, context_bias, w_g, h0, reset, low, high)
    return output


def _check(name: str, z: Tensor, p: Tensor, w_g: Tensor, h0: Tensor | None, reset: Tensor | None) -> None:
    check_scan_inputs(name, z, reset)
    batch, time, channels = z.shape
    check_shape(name, "w_g", w_g, (channels,))
    check_shape(name, "p", p, (batch, time, p.shape[-1]))
    if p.shape[-1] == 0 or channels % p.shape[-1]:
        raise ValueError(f"{name}: P = {p.shape[-1]} does not divide D = {channels}; choose a divisor")
    if h0 is not None:
        check_shape(name, "h0", h0, (batch, channels))
