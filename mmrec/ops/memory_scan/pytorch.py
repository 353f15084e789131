"""`memory_scan` in chunked PyTorch: matrix products within a chunk, one state a chunk between them (derived in README.md)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrec.ops.common import state_dtype

CHUNK = 64  # within a chunk the cost is quadratic in it, between chunks the number of states is T over it


def _chunks(tensor: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    """(B, T, H, ...) to (B, H, N, size, ...): heads outward, time cut into N chunks, the tail padded with zeros."""
    padding = -tensor.shape[1] % size
    if padding:
        tensor = F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, padding))
    return tensor.to(dtype).unflatten(1, (-1, size)).movedim(3, 1)


def _unchunk(chunks: Tensor, time: int) -> Tensor:
    """The way back, without the padding; contiguous, as the fakes promise."""
    return chunks.movedim(1, 3).flatten(1, 2)[:, :time].contiguous()


@dataclass(frozen=True)
class _Decays:
    """What is left of a token's, or of the carried, memory; all (B, H, N, …) and in [0, 1].

    Attributes:
        within: (…, C, C), of what token j wrote when token i ≥ j reads; 0 above the diagonal and across a document's start.
        carried: (…, C), of the chunk's initial memory when token i reads.
        kept: (…, C), of what token j wrote at the chunk's end.
        whole: (…), of the initial memory at the chunk's end.
    """

    within: Tensor
    carried: Tensor
    kept: Tensor
    whole: Tensor


def _decays(log_alpha: Tensor, reset: Tensor | None, dtype: torch.dtype, size: int) -> _Decays:
    log_decay = _chunks(log_alpha.unsqueeze(-1), dtype, size).squeeze(-1).cumsum(-1)  # (B, H, N, C), from the chunk's start
    # How many documents began in the chunk up to each token: two tokens see each other only where the counts agree.
    if reset is None:
        document = torch.zeros(log_decay.shape[0], 1, log_decay.shape[2], size, dtype=torch.int64, device=log_decay.device)
    else:
        document = _chunks(reset.unsqueeze(2).unsqueeze(-1), torch.int64, size).squeeze(-1).cumsum(-1)
    visible = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).tril() & (document.unsqueeze(-1) == document.unsqueeze(-2))
    # Masked before the exponential: above the diagonal the difference is positive and would overflow.
    within = (log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)).masked_fill(~visible, float("-inf")).exp()
    carried = log_decay.masked_fill(document != 0, float("-inf")).exp()
    kept = (log_decay[..., -1:] - log_decay).masked_fill(document != document[..., -1:], float("-inf")).exp()
    return _Decays(within, carried, kept, carried[..., -1])


def _walk(whole: Tensor, added: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The states *before* each chunk, (B, H, N, K, V), and the last one, of `state = whole_n · state + added_n`."""
    before = []
    for n in range(added.shape[2]):
        before.append(state)
        state = whole[:, :, n, None, None] * state + added[:, :, n]
    return torch.stack(before, dim=2), state


def memory_scan_forward(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, M0: Tensor | None, reset: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See the public function. Padded tokens have k = 0 and log α = 0, so that they leave the memory as it is."""
    dtype = state_dtype(q, k, v, log_alpha, M0)
    batch, time, heads, key_width = k.shape
    size = min(CHUNK, time)
    qc, kc, vc = (_chunks(t, dtype, size) for t in (q, k, v))  # (B, H, N, C, K or V)
    decays = _decays(log_alpha, reset, dtype, size)
    memory = torch.zeros(batch, heads, key_width, v.shape[-1], dtype=dtype, device=q.device) if M0 is None else M0.to(dtype)
    initial, last = _walk(decays.whole, (kc * decays.kept.unsqueeze(-1)).mT @ vc, memory)
    within = ((qc @ kc.mT) * decays.within) @ vc
    across = (qc * decays.carried.unsqueeze(-1)) @ initial
    return _unchunk(scale * (within + across), time).to(q.dtype), last


def memory_scan_gradients(
    dr: Tensor,
    dM_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    M0: Tensor | None,
    reset: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to `q`, `k`, `v`, `log_alpha` and `M0` in the state's dtype; the forward's states are computed again."""
    dtype = state_dtype(q, k, v, log_alpha, M0)
    batch, time, heads, key_width = k.shape
    size = min(CHUNK, time)
    qc, kc, vc, drc = (_chunks(t, dtype, size) for t in (q, k, v, dr))
    decays = _decays(log_alpha, reset, dtype, size)
    carried, kept = decays.carried.unsqueeze(-1), decays.kept.unsqueeze(-1)
    zero = torch.zeros(batch, heads, key_width, v.shape[-1], dtype=dtype, device=q.device)
    M, _ = _walk(decays.whole, (kc * kept).mT @ vc, zero if M0 is None else M0.to(dtype))
    # The same walk from the end: dM_n, the gradient to the memory at the chunk's end.
    read = scale * (qc * carried).mT @ drc
    dM, dM0 = _walk(decays.whole.flip(-1), read.flip(2), zero if dM_last is None else dM_last.to(dtype))
    dM = dM.flip(2)

    S, dP = qc @ kc.mT * decays.within, scale * (drc @ vc.mT) * decays.within
    dq_across, dk_across = scale * carried * (drc @ M.mT), kept * (vc @ dM.mT)
    dq, dk, dv = dP @ kc + dq_across, dP.mT @ qc + dk_across, scale * S.mT @ drc + kept * (kc @ dM)

    # Every pair (reader i, writer j) with j < t ≤ i decays by α_t. Sums only, and no diagonal: a difference of the sums over rows and over
    # columns would leave of a small gradient what rounding leaves.
    ones = torch.ones(size, size, dtype=dtype, device=q.device)
    pairs = (ones.triu() @ ((qc @ kc.mT) * dP).tril(-1)).tril(-1).sum(-1)  # t rows: Σ_{i≥t} Σ_{j<t}
    readers = (ones.triu() @ (qc * dq_across).sum(-1, keepdim=True)).squeeze(-1)  # Σ_{i≥t}, of the initial memory
    writers = (ones.tril(-1) @ (kc * dk_across).sum(-1, keepdim=True)).squeeze(-1)  # Σ_{j<t}, for the memory at the end
    through = decays.whole * (dM * M).sum((-1, -2))
    dlog_alpha = pairs + readers + writers + through.unsqueeze(-1)
    dlog_alpha = _unchunk(dlog_alpha.unsqueeze(-1), time).squeeze(-1)
    return _unchunk(dq, time), _unchunk(dk, time), _unchunk(dv, time), dlog_alpha, dM0
