"""Launchers of `gated_scan_from_logits`: the kernels of `gated_scan`, which form γ themselves."""

from torch import Tensor

from mmrec.ops.decay_log.kernels import launch_forward as launch_decay_log
from mmrec.ops.gated_scan.kernels import (
    Decay,
    adjoint_scan,
    forward_segments,
    newton_is_faster,
    newton_scan,
    segmented_scan,
    sequential_scan,
)
from mmrec.ops.gated_scan.logits import Inputs


def launch_forward(given: Inputs) -> tuple[Tensor, Tensor]:
    """`h` (B, T, D), contiguous in the dtype of `z`, and `h_last` (B, D) fp32."""
    decay = Decay(*given.gates(), given.low, given.high)
    segments = forward_segments(given.z, given.p, decay, given.reset)
    if segments > 1:
        return segmented_scan(given.z, given.p, decay, given.w_g, given.h0, given.reset, segments)
    if newton_is_faster(given.z):
        # It goes over its tiles several times, for few channels: there a pass over log γ is not what takes the time.
        of_context = None if given.context_bias is None else given.context_bias.contiguous()
        log_gamma = launch_decay_log(given.logits, given.bias.contiguous(), given.context, of_context, given.low, given.high)
        h, h_last, _ = newton_scan(given.z, given.p, log_gamma, given.w_g, given.h0, given.reset)
        return h, h_last
    return sequential_scan(given.z, given.p, decay, given.w_g, given.h0, given.reset)


def launch_backward(
    dh: Tensor,
    dh_last: Tensor | None,
    h: Tensor,
    given: Inputs,
    dz: Tensor,
    dp: Tensor,
    dlogits: Tensor,
    dbias: Tensor,
    dcontext: Tensor | None,
    dcontext_bias: Tensor | None,
    dw_g: Tensor,
    dh0: Tensor,
) -> None:
    """Write the gradients into the given tensors, of any strides and dtypes; sums over tokens in two fixed stages."""
    decay, ddecay = Decay(*given.gates(), given.low, given.high), Decay(dlogits, dbias, dcontext, dcontext_bias)
    adjoint_scan(dh, dh_last, h, given.z, given.p, decay, given.w_g, given.h0, given.reset, dz, dp, ddecay, dw_g, dh0)
