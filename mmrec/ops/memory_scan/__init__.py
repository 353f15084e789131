"""The long-term memory: a decayed sum of outer products, read by a query."""

from torch import Tensor

from mmrec.ops.common import check_scan_inputs, check_shape
from mmrec.ops.memory_scan import addressed  # noqa: F401  registers the backward through the addresses
from mmrec.ops.memory_scan.naive import memory_scan_naive
from mmrec.ops.memory_scan.operator import memory_scan_op

__all__ = ["memory_scan", "memory_scan_naive"]


def memory_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    M0: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`M_t = α_t M_{t-1} + k_t v_tᵀ`, `r_t = scale · M_tᵀ q_t`.

    Args:
        q, k: (B, T, H, K), queries and keys, any float dtype.
        v: (B, T, H, V), values.
        log_alpha: (B, T, H), log-decays ≤ 0 of a whole head, fp32 or bf16.
        M0: (B, H, K, V) fp32, the memory before the first token; None means zero.
        reset: (B, T) boolean; where true the memory is zero before the token enters.
        scale: a factor of the read-out.

    Returns:
        `r` (B, T, H, V) in the dtype of `q`, and `M_last` (B, H, K, V) in fp32 (float64 for float64 inputs).

    Raises:
        ValueError: for T = 0 or a wrong shape.
    """
    check_scan_inputs("memory_scan", q, reset, ndim=4)
    batch, time, heads, key_width = q.shape
    check_shape("memory_scan", "k", k, (batch, time, heads, key_width))
    check_shape("memory_scan", "v", v, (batch, time, heads, v.shape[-1]))
    check_shape("memory_scan", "log_alpha", log_alpha, (batch, time, heads))
    if M0 is not None:
        check_shape("memory_scan", "M0", M0, (batch, heads, key_width, v.shape[-1]))
    output: tuple[Tensor, Tensor] = memory_scan_op(q, k, v, log_alpha, M0, reset, scale)
    return output
