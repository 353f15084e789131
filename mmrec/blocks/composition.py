"""A block's recurrent half as a chain of its operators, each differentiated on its own: what `mixer.mix` does in one function.

It runs where the short-term memory is linear (`state_gate: false`), in a layer with a window that goes on from a carried state, and as the
form that the fused one is compared with.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmrec.blocks.hem import Projections
from mmrec.core import uboo
from mmrec.core.memory import BlockState, no_matrix
from mmrec.ops import (
    exp_product_scan,
    gated_read_out,
    gated_scan,
    linear_scan,
    memory_address,
    memory_scan,
    short_convolution,
    window_attention,
)
from mmrec.ops.window_attention import WindowState

if TYPE_CHECKING:
    from mmrec.blocks.mm_rec_block import MMRecBlock


def compose(
    block: "MMRecBlock", parts: Projections, log_alpha: Tensor, state: BlockState | None, reset: Tensor | None, orthogonalize: bool
) -> tuple[Tensor, Tensor, Tensor, BlockState]:
    """Gated read-out (B, T, D), `h` as the output and as the planning target sees it (B, T, D), and the last state."""
    q, k, v, z, p, e = parts
    h, h_last = short_term_memory(block, z, p, block.mdi(z, k), None if state is None else state.h, reset)
    h, h_target = uboo.route(h, orthogonalize)
    if block.has_window:
        r, window, recent = window_memory(block, q, k, v, h, log_alpha, state, reset)
        after = BlockState(h_last, no_matrix(r), None, window, recent)
    else:
        r, M_last = long_term_memory(block, q, k, v, h, log_alpha, None if state is None else state.M, reset)
        after = BlockState(h_last, M_last)
    return read_out(block, h, r, e), h, h_target, after


def long_term_memory(
    block: "MMRecBlock", q: Tensor, k: Tensor, v: Tensor, h: Tensor, log_alpha: Tensor, M0: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`r` (B, T, H, V) and the last memory (B, H, K, V); the short-term state helps to address it."""
    return memory_scan(*_addressed(block, q, k, v, h), log_alpha, M0, reset)


def window_memory(
    block: "MMRecBlock",
    q: Tensor,
    k: Tensor,
    v: Tensor,
    h: Tensor,
    log_alpha: Tensor,
    state: BlockState | None,
    reset: Tensor | None,
) -> tuple[Tensor, WindowState, Tensor | None]:
    """`r` (B, T, H, V), the last window, the last tokens' q and k, (B, J − 1, 2D) or None; addressed and forgetting as the matrix is."""
    assert block.temperature is not None  # a layer with a window has one
    recent, window = None, None if state is None else state.window
    if block.convolution is not None:
        before = (None, None) if state is None or state.recent is None else state.recent.chunk(2, dim=-1)
        (q, q_last), (k, k_last) = (
            short_convolution(x, gains, past, reset) for x, gains, past in zip((q, k), block.convolution.gains(), before, strict=True)
        )
        recent = torch.cat([q_last, k_last], dim=-1)
    r, after = window_attention(*_addressed(block, q, k, v, h), log_alpha, block.temperature(), block.config.window, window, reset)
    return r, after, recent


def _addressed(block: "MMRecBlock", q: Tensor, k: Tensor, v: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`q̃`, `k̃` and the values, (B, T, H, K) each."""
    heads = (block.config.heads, block.config.head_dim)
    query, key = memory_address(q.unflatten(-1, heads), k.unflatten(-1, heads), h.unflatten(-1, heads))
    return query, key, v.unflatten(-1, heads)


def read_out(block: "MMRecBlock", h: Tensor, r: Tensor, e: Tensor) -> Tensor:
    """`σ(e) (g_r RMSNorm_head(r) + g_h RMSNorm_head(h))`, (B, T, D): what `W_o` reads."""
    heads = (block.config.heads, block.config.head_dim)
    gated = gated_read_out(r, h.unflatten(-1, heads), e.unflatten(-1, heads), block.g_r, block.g_h, block.config.norm_eps)
    return gated.flatten(-2)


def short_term_memory(
    block: "MMRecBlock", z: Tensor, p: Tensor, log_gamma: Tensor, h0: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`h` (B, T, D) and its last state (B, D): the core formula, or, without a state gate, the linear recurrence it becomes."""
    if block.config.state_gate:
        return gated_scan(z, p, log_gamma, block.state_gate.w_g, h0, reset)
    wide = log_gamma.dtype
    gate = torch.sigmoid(p.to(wide)).repeat_interleave(z.shape[-1] // p.shape[-1], dim=-1)
    h, h_last = linear_scan(-torch.expm1(log_gamma) * z.to(wide) * gate, log_gamma, None, reset)
    if h0 is not None:
        carried, carried_last = exp_product_scan(log_gamma, h0, accum_dtype=getattr(torch, block.config.decay_accum_dtype))
        if reset is not None:
            ended = reset.cumsum(1).bool().unsqueeze(-1)  # a document's start forgets what was carried in
            carried, carried_last = carried.masked_fill(ended, 0), carried_last.masked_fill(ended[:, -1], 0)
        h, h_last = h + carried, h_last + carried_last
    return h.to(z.dtype), h_last
