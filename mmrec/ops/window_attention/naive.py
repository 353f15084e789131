"""Ground truth of `window_attention`: a loop over time that carries the last W − 1 tokens from one to the next."""

import torch
from torch import Tensor

from mmrec.ops.common import state_dtype
from mmrec.ops.window_attention.state import WindowState


def window_attention_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    temperature: Tensor,
    window: int,
    state: WindowState | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, WindowState]:
    """Same signature as the public operator; the state in fp32, float64 for float64 inputs."""
    dtype = state_dtype(q, k, v, log_alpha, temperature)
    batch, time, heads, key_width = q.shape
    if state is None:
        past = (batch, window - 1, heads)
        keys, values = (torch.zeros(*past, width, dtype=dtype, device=q.device) for width in (key_width, v.shape[-1]))
        logs, seen = torch.zeros(past, dtype=dtype, device=q.device), torch.zeros(past[:2], dtype=torch.bool, device=q.device)
    else:
        keys, values, logs, seen = *(part.to(dtype) for part in state[:3]), state.seen
    outputs = []
    for t in range(time):
        if reset is not None:
            seen = seen & ~reset[:, t, None]
        keys, values, logs = (
            torch.cat([old, new[:, t : t + 1].to(dtype)], dim=1) for old, new in ((keys, k), (values, v), (logs, log_alpha))
        )
        seen = torch.cat([seen, seen.new_ones(batch, 1)], dim=1)
        # The decays of the tokens after j, up to t.
        after = torch.cat([logs[:, 1:], torch.zeros_like(logs[:, :1])], dim=1).flip(1).cumsum(1).flip(1)
        scores = temperature.to(dtype) * (q[:, t].to(dtype).unsqueeze(1) * keys).sum(-1) + after
        p = scores.masked_fill(~seen.unsqueeze(-1), float("-inf")).softmax(1)
        outputs.append((p.unsqueeze(-1) * values).sum(1))
        keys, values, logs, seen = keys[:, 1:], values[:, 1:], logs[:, 1:], seen[:, 1:]
    return torch.stack(outputs, dim=1).to(v.dtype), WindowState(keys, values, logs, seen)
