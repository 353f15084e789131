"""Softmax attention to the recent past, with a decay of each head in the scores: what `memory_scan` is for the distant past."""

import torch
from torch import Tensor

from mmrec.ops.common import behind, check_scan_inputs, check_shape
from mmrec.ops.window_attention.naive import window_attention_naive
from mmrec.ops.window_attention.operator import window_attention_op
from mmrec.ops.window_attention.state import WindowState, first_visible, next_state

__all__ = ["WindowState", "window_attention", "window_attention_naive"]


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    temperature: Tensor,
    window: int,
    state: WindowState | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, WindowState]:
    """`r_t = Σ_j p_tj v_j` over the last W tokens, `p_t = softmax_j(temperature · ⟨q_t, k_j⟩ + Σ_{i=j+1..t} log α_i)`.

    Args:
        q, k: (B, T, H, K), queries and keys, any float dtype and strides.
        v: (B, T, H, V), values.
        log_alpha: (B, T, H), log-decays ≤ 0 of a whole head, fp32 or bf16.
        temperature: (H,), fp32, what the scores are multiplied by.
        window: W ≥ 1, how many tokens a query sees, itself among them.
        state: the W − 1 tokens before the first; None means that there were none.
        reset: (B, T) boolean; where true the token sees itself only, and later ones see nothing before it.

    Returns:
        `r` (B, T, H, V) in the dtype of `v`, and the state after the last token: views of the inputs where these have W − 1 tokens, to
        be cloned by who keeps them longer.

    Raises:
        ValueError: for T = 0, a window below 1 or a wrong shape.
    """
    check_scan_inputs("window_attention", q, reset, ndim=4)
    if window < 1:
        raise ValueError(f"window_attention: window = {window}; a token sees at least itself")
    batch, time, heads, key_width = q.shape
    check_shape("window_attention", "k", k, (batch, time, heads, key_width))
    check_shape("window_attention", "v", v, (batch, time, heads, v.shape[-1]))
    check_shape("window_attention", "log_alpha", log_alpha, (batch, time, heads))
    check_shape("window_attention", "temperature", temperature, (heads,))
    seen = None
    if state is not None:
        shapes = ((batch, window - 1, heads, key_width), (batch, window - 1, heads, v.shape[-1]), (batch, window - 1, heads))
        for name, tensor, shape in zip(WindowState._fields, state, (*shapes, (batch, window - 1)), strict=True):
            check_shape("window_attention", f"state.{name}", tensor, shape)
        log_alpha = log_alpha.to(torch.promote_types(log_alpha.dtype, torch.float32))  # narrower ones would round the state's
        k, v, log_alpha = behind(state.k, k), behind(state.v, v), behind(state.log_alpha, log_alpha)
        seen = state.seen
    first = first_visible(q, window, seen, reset)
    r: Tensor = window_attention_op(q, k, v, log_alpha, temperature, first, window)[0]
    return r, next_state(k, v, log_alpha, first, window)
