"""Launchers of `gated_scan_from_logits`: the kernels of `gated_scan`, which form γ themselves."""

from torch import Tensor

from mmrec.ops.decay_log.kernels import launch_forward as launch_decay_log
from mmrec.ops.gated_scan.kernels import Decay, adjoint_scan, newton_is_faster, newton_scan, sequential_scan


def launch_forward(
    z: Tensor,
    p: Tensor,
    logits: Tensor,
    bias: Tensor,
    context: Tensor | None,
    context_bias: Tensor | None,
    w_g: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor]:
    """`h` (B, T, D), contiguous in the dtype of `z`, and `h_last` (B, D) fp32."""
    if newton_is_faster(z):
        # It goes over its tiles several times, for few channels: there a pass over log γ is not what takes the time.
        of_context = None if context_bias is None else context_bias.contiguous()
        log_gamma = launch_decay_log(logits, bias.contiguous(), context, of_context, low, high)
        h, h_last, _ = newton_scan(z, p, log_gamma, w_g, h0, reset)
        return h, h_last
    return sequential_scan(z, p, Decay(logits, bias, context, context_bias, low, high), w_g, h0, reset)


def launch_backward(
    dh: Tensor,
    dh_last: Tensor | None,
    h: Tensor,
    z: Tensor,
    p: Tensor,
    logits: Tensor,
    bias: Tensor,
    context: Tensor | None,
    context_bias: Tensor | None,
    w_g: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    low: float,
    high: float,
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
    decay = Decay(logits, bias, context, context_bias, low, high)
    adjoint_scan(dh, dh_last, h, z, p, decay, w_g, h0, reset, dz, dp, Decay(dlogits, dbias, dcontext, dcontext_bias), dw_g, dh0)
