"""Launchers of `gated_scan_from_logits`: the kernels of `gated_scan`, which form γ themselves."""

from torch import Tensor

from mmrec.ops.decay_log.kernels import launch_forward as launch_decay_log
from mmrec.ops.gated_scan.kernels import Decay, adjoint_scan, fastest_scan
from mmrec.ops.gated_scan.logits import Inputs


def launch_forward(given: Inputs) -> tuple[Tensor, Tensor]:
    """`h` (B, T, D), contiguous in the dtype of `z`, and `h_last` (B, D) fp32."""

    def log_gamma() -> Tensor:
        # Newton's method goes over its tiles several times, for few channels: there a pass over log γ is not what takes the time.
        of_context = None if given.context_bias is None else given.context_bias.contiguous()
        return launch_decay_log(given.logits, given.bias.contiguous(), given.context, of_context, given.low, given.high)

    decay = Decay(*given.gates(), given.low, given.high)
    return fastest_scan(given.z, given.p, decay, given.w_g, given.h0, given.reset, log_gamma)


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
