"""What the operators share: state dtype, input checks, a state before a sequence, the two sequential recurrences of the PyTorch forms."""

import torch
from torch import Tensor


def state_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where any input is float64 (the tests' ground truth), else float32: a bf16 state loses every decay above 0.9961."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def check_scan_inputs(name: str, reference: Tensor, reset: Tensor | None, ndim: int = 3) -> None:
    """Refuse what no scan can run on: a wrong rank, T = 0, a reset mask that is not boolean (B, T)."""
    if reference.ndim != ndim:
        raise ValueError(f"{name}: the input has shape {tuple(reference.shape)}; give {ndim} dimensions (B, T, ...)")
    if reference.shape[1] == 0:
        raise ValueError(f"{name}: T = 0; give at least one token")
    if reset is not None and (reset.dtype != torch.bool or reset.shape != reference.shape[:2]):
        raise ValueError(
            f"{name}: reset has dtype {reset.dtype} and shape {tuple(reset.shape)}; give booleans of shape {tuple(reference.shape[:2])}"
        )


def check_shape(name: str, argument: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Refuse an argument of another shape, naming it."""
    if tensor.shape != expected:
        raise ValueError(f"{name}: {argument} has shape {tuple(tensor.shape)}; it must be {expected}")


def behind(past: Tensor, tensor: Tensor) -> Tensor:
    """A state's tokens (B, P, ...) and then the sequence's (B, T, ...), in the sequence's dtype."""
    return torch.cat([past.to(tensor.dtype), tensor], dim=1)


def scan_forward(a_TBD: Tensor, x_TBD: Tensor, h0_BD: Tensor) -> Tensor:
    """`h_t = a_t h_{t-1} + x_t` by a loop over time.

    Args:
        a_TBD: decays, time first, contiguous.
        x_TBD: inputs, time first, same dtype.
        h0_BD: the state before the first token.

    Returns:
        All states, (T, B, D).
    """
    h_TBD = torch.empty_like(x_TBD)
    previous = h0_BD
    for t in range(x_TBD.shape[0]):
        previous = torch.addcmul(x_TBD[t], a_TBD[t], previous, out=h_TBD[t])
    return h_TBD


def scan_backward(jacobian_TBD: Tensor, dh_TBD: Tensor, dh_last_BD: Tensor) -> Tensor:
    """The adjoint `g_t = dh_t + J_{t+1} g_{t+1}` of a recurrence with diagonal Jacobian `J_t = ∂h_t/∂h_{t-1}`.

    Args:
        jacobian_TBD: `J_t`, time first.
        dh_TBD: the cotangent that arrives at every output.
        dh_last_BD: the cotangent of the final state, added to the last token's.

    Returns:
        `g_t`, (T, B, D); the gradient to the initial state is `J_1 g_1`.
    """
    g_TBD = torch.empty_like(jacobian_TBD)
    last = dh_TBD.shape[0] - 1
    g_TBD[last] = dh_TBD[last] + dh_last_BD
    for t in range(last - 1, -1, -1):
        torch.addcmul(dh_TBD[t], jacobian_TBD[t + 1], g_TBD[t + 1], out=g_TBD[t])
    return g_TBD


def time_first(tensor_BTD: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T, D) as a contiguous (T, B, D) of `dtype`, the layout in which a loop over time touches one block of memory a step."""
    return tensor_BTD.to(dtype).transpose(0, 1).contiguous()


def batch_first(tensor_TBD: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, B, D) as a contiguous (B, T, D) of `dtype`: what the operators return, so that their fakes can promise the strides."""
    return tensor_TBD.transpose(0, 1).to(dtype).contiguous()


def previous_states(h_TBD: Tensor, h0_BD: Tensor, reset_TB1: Tensor | None) -> Tensor:
    """The state that entered each token: `h_{t-1}`, zero where a document starts."""
    previous = torch.cat([h0_BD.unsqueeze(0), h_TBD[:-1]])
    return previous if reset_TB1 is None else previous.masked_fill(reset_TB1, 0)


def reset_time_first(reset_BT: Tensor) -> Tensor:
    """A (B, T) mask as (T, B, 1), to broadcast over channels."""
    return reset_BT.transpose(0, 1).unsqueeze(-1)
