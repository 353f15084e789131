"""`memory_scan` in chunked PyTorch: matrix products within a chunk, one state a chunk between them (derived in README.md)."""

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


def memory_scan_pytorch(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, M0: Tensor | None, reset: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See the public function. Padded tokens have k = 0 and log α = 0, so that they leave the memory as it is."""
    dtype = state_dtype(q, k, v, log_alpha, M0)
    batch, time, heads, key_width = k.shape
    size = min(CHUNK, time)
    q_chunks, k_chunks, v_chunks = (_chunks(t, dtype, size) for t in (q, k, v))  # (B, H, N, C, K or V)
    log_decay = _chunks(log_alpha.unsqueeze(-1), dtype, size).squeeze(-1).cumsum(-1)  # (B, H, N, C), from the chunk's start

    # How many documents began in the chunk up to each token: two tokens see each other only where the counts agree.
    if reset is None:
        document = torch.zeros(batch, 1, log_decay.shape[2], size, dtype=torch.int64, device=q.device)
    else:
        document = _chunks(reset.unsqueeze(2).unsqueeze(-1), torch.int64, size).squeeze(-1).cumsum(-1)
    causal = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    visible = causal & (document.unsqueeze(-1) == document.unsqueeze(-2))
    # Masked before the exponential: above the diagonal the difference is positive and would overflow, and 0 · inf has no gradient.
    difference = (log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)).masked_fill(~visible, float("-inf"))
    within = ((q_chunks @ k_chunks.transpose(-1, -2)) * difference.exp()) @ v_chunks

    carried = log_decay.masked_fill(document != 0, float("-inf")).exp()  # what is left of the chunk's initial memory at each token
    kept = (log_decay[..., -1:] - log_decay).masked_fill(document != document[..., -1:], float("-inf")).exp()
    written = (k_chunks * kept.unsqueeze(-1)).transpose(-1, -2) @ v_chunks  # (B, H, N, K, V), what the chunk adds by its end

    memory = torch.zeros(batch, heads, key_width, v.shape[-1], dtype=dtype, device=q.device) if M0 is None else M0.to(dtype)
    initial = []
    for n in range(written.shape[2]):
        initial.append(memory)
        memory = carried[:, :, n, -1, None, None] * memory + written[:, :, n]
    across = (q_chunks * carried.unsqueeze(-1)) @ torch.stack(initial, dim=2)
    r = (scale * (within + across)).movedim(1, 3).flatten(1, 2)[:, :time]
    return r.to(q.dtype), memory
