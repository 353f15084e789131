"""The gate of the feed-forward half."""

from torch import Tensor

from mmrec.ops.common import check_scan_inputs
from mmrec.ops.swiglu.naive import swiglu_naive
from mmrec.ops.swiglu.operator import swiglu_op

__all__ = ["swiglu", "swiglu_naive"]


def swiglu(gate_up: Tensor) -> Tensor:
    """`SiLU(gate) ⊙ up` of the two halves of one tensor (Shazeer 2020, arXiv:2002.05202), in fp32.

    Args:
        gate_up: (B, T, 2F), any float dtype and strides: the output of one product, not split.

    Returns:
        (B, T, F), contiguous, in its dtype.

    Raises:
        ValueError: for T = 0, another rank, or an odd width.
    """
    check_scan_inputs("swiglu", gate_up, None)
    if gate_up.shape[2] % 2:
        raise ValueError(f"swiglu: gate_up has {gate_up.shape[2]} channels; the two halves must be equal")
    output: Tensor = swiglu_op(gate_up)
    return output
