"""`window_attention` in PyTorch, dense over a block of queries and what it sees, block after block (derived in README.md)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mmrec.ops.common import state_dtype

BLOCK = 256  # queries at a time: scores are that many by W − 1 more


def log_decays(log_alpha: Tensor) -> Tensor:
    """Log-decays summed up to each token, (B, H, S) in float64: of a long sequence fp32 sums lose what their differences are."""
    return log_alpha.transpose(1, 2).cumsum(-1, dtype=torch.float64)


def decay_gradients(queries: Tensor, keys: Tensor) -> Tensor:
    """The gradient to log α, (B, S, H), from the sums of dS over a query's other keys (B, H, T) and over a key's later queries (B, H, S).

    Every pair of a query t and a key j < i ≤ t decays by α_i: of the pairs whose key lies before i, all whose query does not.
    """
    later = keys.double()
    later[..., keys.shape[-1] - queries.shape[-1] :] -= queries
    return (later.cumsum(-1) - later).transpose(1, 2)


def _blocks(time: int, length: int, window: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, and for each all keys that one of them may see."""
    for begin in range(0, time, BLOCK):
        end = min(begin + BLOCK, time)
        yield slice(begin, end), slice(max(length - time + begin - window + 1, 0), length - time + end)


class _Scores:
    """Of blocks of queries; heads lie outside of tokens."""

    def __init__(self, q: Tensor, k: Tensor, log_alpha: Tensor, temperature: Tensor, first: Tensor | None, window: int, dtype: torch.dtype):
        self.q, self.k = (tensor.to(dtype).transpose(1, 2) for tensor in (q, k))
        self.c, self.dtype = log_decays(log_alpha), dtype
        self.temperature = temperature.to(dtype)[:, None, None]
        self.token = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)
        self.first = (self.token - (window - 1)).unsqueeze(0) if first is None else first

    def of(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor, Tensor]:
        """`⟨q_t, k_j⟩`; the scores, −∞ where t does not see j; and whether j is t."""
        products = self.q[:, :, rows] @ self.k[:, :, columns].mT
        token, key = self.token[rows, None], torch.arange(columns.start, columns.stop, device=products.device)
        c = self.c[..., columns]  # the last of them are the queries' own
        decay = (c[..., rows.start - rows.stop :].unsqueeze(-1) - c.unsqueeze(-2)).to(self.dtype)
        visible = (key <= token) & (key >= self.first[:, rows].unsqueeze(-1))
        # Masked before the exponential: above the diagonal the difference is positive and would overflow.
        scores = (self.temperature * products + decay).masked_fill(~visible.unsqueeze(1), float("-inf"))
        return products, scores, key == token


def window_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, temperature: Tensor, first: Tensor | None, window: int
) -> tuple[Tensor, Tensor]:
    """`r` (B, T, H, V) in the dtype of `v` and the scores' log-sum-exp (B, H, T), both contiguous."""
    dtype = state_dtype(q, k, v, log_alpha, temperature)
    scores, values = _Scores(q, k, log_alpha, temperature, first, window, dtype), v.to(dtype).transpose(1, 2)
    r, lse = [], []
    for rows, columns in _blocks(q.shape[1], k.shape[1], window):
        _, block, _ = scores.of(rows, columns)
        lse.append(block.logsumexp(-1))
        r.append((block - lse[-1].unsqueeze(-1)).exp() @ values[:, :, columns])
    return torch.cat(r, dim=2).transpose(1, 2).to(v.dtype).contiguous(), torch.cat(lse, dim=-1)


def window_attention_gradients(
    dr: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    temperature: Tensor,
    first: Tensor | None,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to `q`, `k`, `v`, `log_alpha` and `temperature`, in fp32 or wider."""
    dtype = state_dtype(q, k, v, log_alpha, temperature)
    scores = _Scores(q, k, log_alpha, temperature, first, window, dtype)
    values, cotangent = (tensor.to(dtype).transpose(1, 2) for tensor in (v, dr))
    dq, dk, dv = (torch.zeros_like(tensor) for tensor in (scores.q, scores.k, values))
    of_queries, of_keys = lse.new_zeros(lse.shape), lse.new_zeros(dk.shape[:-1])
    dtemperature = torch.zeros_like(scores.temperature.flatten())
    for rows, columns in _blocks(q.shape[1], k.shape[1], window):
        products, block, own = scores.of(rows, columns)
        p = (block - lse[:, :, rows].unsqueeze(-1)).exp()
        dv[:, :, columns] += p.mT @ cotangent[:, :, rows]
        dP = cotangent[:, :, rows] @ values[:, :, columns].mT
        # Of a query's own key what is left: a query's sum is zero, which a difference near it would not say exactly.
        dS = (p * (dP - (p * dP).sum(-1, keepdim=True))).masked_fill(own, 0)
        of_queries[..., rows] = dS.sum(-1)
        of_keys[..., columns] += dS.sum(-2)
        dS = dS - of_queries[..., rows, None] * own
        dtemperature += (dS * products).sum((0, 2, 3))
        dq[:, :, rows] = scores.temperature * (dS @ scores.k[:, :, columns])
        dk[:, :, columns] += scores.temperature * (dS.mT @ scores.q[:, :, rows])
    dq, dk, dv = (gradient.transpose(1, 2) for gradient in (dq, dk, dv))
    return dq, dk, dv, decay_gradients(of_queries, of_keys), dtemperature
