"""Where the long-term memory is written and read: query and key, with the short-term state added, of length one a head."""

from torch import Tensor

from mmrec.ops.common import check_scan_inputs, check_shape
from mmrec.ops.memory_address.naive import l2norm, memory_address_naive
from mmrec.ops.memory_address.operator import memory_address_op

__all__ = ["l2norm", "memory_address", "memory_address_naive"]


def memory_address(q: Tensor, k: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """`q̃ = L2norm(q + h)`, `k̃ = L2norm(k + h)` with `L2norm(x) = x · rsqrt(Σx² + 1e-6)` over a head's width, in fp32.

    Args:
        q, k: (B, T, H, K), any float dtype and strides.
        h: (B, T, H, K), the short-term state.

    Returns:
        Both (B, T, H, K), contiguous, in the dtypes of `q` and `k`.

    Raises:
        ValueError: for T = 0 or a wrong shape.
    """
    check_scan_inputs("memory_address", q, None, ndim=4)
    check_shape("memory_address", "k", k, tuple(q.shape))
    check_shape("memory_address", "h", h, tuple(q.shape))
    output: tuple[Tensor, Tensor] = memory_address_op(q, k, h)
    return output
