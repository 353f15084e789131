"""The recurrent half of a block between its two matrix products, as one autograd function: from the projections to the gated read-out.

Forward it is nothing but its operators in turn. Backward it hands each operator's mutating form (`…_bwd_out`) a slice of one buffer, so
that the fused projection gets its gradient as one tensor: autograd would concatenate the six parts and add up those of `z`, `k` and `h`,
which have two readers each.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrec.core import uboo
from mmrec.core.decay import LOG_GAMMA_MAX, LOG_GAMMA_MIN
from mmrec.core.mdi import GateWeights
from mmrec.ops import gated_read_out, gated_scan_from_logits
from mmrec.ops.column_sum import column_sum
from mmrec.ops.gelu_backward import gelu_backward
from mmrec.ops.registration import refuse_second_order
from mmrec.ops.wide_product import wide_product

_ops = torch.ops.mmrec
_PARTS = 6


class Mixed(NamedTuple):
    """What `mix` returns.

    Attributes:
        gated: (B, T, D), what `W_o` reads.
        h: (B, T, D), the short-term states, as UBÖO's planning error sees them.
        h_last: (B, D) fp32.
        memory: (B, H, K, V) fp32, the last long-term memory; where it is a window, its keys (B, T, H, K).
    """

    gated: Tensor
    h: Tensor
    h_last: Tensor
    memory: Tensor


class Window(NamedTuple):
    """A long-term memory that is a window, of a sequence that nothing was read before.

    Attributes:
        temperature: (H,) fp32. tokens: W. first: (B, T) int32, the first token that each one sees, or None: W alone decides.
        q_gain, k_gain: (D, J) fp32, of short convolutions of q and k before they are addresses; None: there are none.
    """

    temperature: Tensor
    tokens: int
    first: Tensor | None
    q_gain: Tensor | None = None
    k_gain: Tensor | None = None


def mix(
    fused: Tensor | None,
    parts: Sequence[Tensor],
    log_alpha: Tensor,
    decay: GateWeights,
    context: GateWeights | None,
    w_g: Tensor,
    g_r: Tensor,
    g_h: Tensor,
    h0: Tensor | None,
    M0: Tensor | None,
    reset: Tensor | None,
    *,
    window: Window | None = None,
    eps: float,
    orthogonalize: bool,
    recompute: bool,
) -> Mixed:
    """Decay, short-term memory, addresses, long-term memory and gated read-out of one block.

    Args:
        fused: (B, T, 5D + P), q, k, v, z, p and e side by side; None: they are `parts`.
        parts: the six where `fused` is None, (B, T, D) each but `p`, (B, T, P).
        log_alpha: (B, T, H) fp32.
        decay, context: the gates' weights; their products are formed in the dtype of the projections. Without a context the decay is
            DPG's, with a ReLU in it.
        w_g: (D,). g_r, g_h: (H, K).
        h0, M0, reset: as the operators'.
        window: where the long-term memory is one; `M0` must be None then.
        eps: of the read-out's norms.
        orthogonalize: what reaches `h` through `Mixed.h` loses its part along what reaches it through `gated` (see `uboo.route`).
        recompute: keep neither addresses nor memories for the backward, which forms them again: 8 of 29 bytes a channel in bf16, with heads
            of 128.
    """
    gates = (*decay, *(context or (None,) * 4))
    temperature, tokens, first, *gains = window or (None, 0, None, None, None)
    six = parts if fused is None else (None,) * _PARTS
    tensors = (fused, *six, log_alpha, *gates, w_g, g_r, g_h, h0, M0, reset, *gains, temperature, first)
    return Mixed(*_Mix.apply(eps, orthogonalize, tokens, torch.is_grad_enabled() and not recompute, *tensors))


def _split(fused: Tensor, channels: int) -> tuple[Tensor, ...]:
    """q, k, v, z, p and e as views."""
    return fused.split([channels] * 4 + [fused.shape[-1] - 5 * channels, channels], dim=-1)


class _Hidden(NamedTuple):
    """What the backward needs of a gate: its hidden layer (N, G), before a GELU and behind a ReLU, and both weights as they multiplied."""

    inner: Tensor
    W_in: Tensor
    W_out: Tensor


def _gate(x: Tensor, W_in: Tensor, b_in: Tensor, W_out: Tensor, relu: bool) -> tuple[_Hidden, Tensor]:
    """The hidden layer, and the logits (B, T, D); `x` is a slice, which products take as it is."""
    W_in, W_out = W_in.to(x.dtype), W_out.to(x.dtype)
    inner = torch.addmm(b_in.to(x.dtype), x.flatten(0, 1), W_in.t())
    if relu:
        inner = F.relu(inner)
    logits = torch.mm(inner if relu else F.gelu(inner), W_out.t())
    return _Hidden(inner, W_in, W_out), logits.view(x.shape[0], x.shape[1], -1)


def _gate_backward(dlogits: Tensor, gate: _Hidden, x: Tensor, dx: Tensor, relu: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Gradients to `W_in`, `b_in` and `W_out`, in `dtype`; the one to `x` is added to `dx`, in place."""
    inner, W_in, W_out = gate
    flat = dlogits.flatten(0, 1)
    dhidden = torch.mm(flat, W_out)
    if relu:
        hidden, dinner = inner, torch.ops.aten.threshold_backward(dhidden, inner, 0)
        db_in = column_sum(dinner, dtype)
    else:
        hidden, dinner, db_in = gelu_backward(dhidden, inner, dtype)
    dx.flatten(0, 1).addmm_(dinner, W_in)
    return wide_product(dinner.t(), x.flatten(0, 1), dtype), db_in, wide_product(flat.t(), hidden, dtype)


def _addresses(q: Tensor, k: Tensor, h: Tensor, heads: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the long-term memory, and the scales by which they became unit vectors."""
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _ops.memory_address_scaled(*(x.unflatten(-1, heads) for x in (q, k, h)))
    return found


def _convolved(q: Tensor, k: Tensor, gains: Sequence[Tensor | None], reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """What addresses are made of."""
    if gains[0] is None:
        return q, k
    return _ops.short_convolution(q, gains[0], reset), _ops.short_convolution(k, gains[1], reset)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, eps: float, orthogonalize: bool, window: int, keep: bool, fused: Tensor | None, *rest: Any) -> Any:
        six, log_alpha, decay, context = rest[:6], rest[6], rest[7:11], rest[11:15]
        w_g, g_r, g_h, h0, M0, reset, *gains, temperature, first = rest[15:]
        (W_in, b_in, W_out, out_bias), (cW_in, cb_in, cW_out, cout_bias) = decay, context
        q, k, v, z, p, e = six if fused is None else _split(fused, w_g.shape[0])
        heads = (g_r.shape[0], g_r.shape[1])
        relu = cW_in is None
        gate, logits = _gate(z, W_in, b_in, W_out, relu)
        c_gate, c_logits = ((None,) * 3, None) if relu else _gate(k, cW_in, cb_in, cW_out, relu)
        gate_logits = (logits, out_bias, c_logits, cout_bias)
        h, h_last = gated_scan_from_logits(z, p, *gate_logits, w_g, h0, reset, low=LOG_GAMMA_MIN, high=LOG_GAMMA_MAX)
        convolved = _convolved(q, k, gains, reset)
        query, key, *scales = _addresses(*convolved, h, heads)
        if window:
            r, lse = _ops.window_attention(query, key, v.unflatten(-1, heads), log_alpha, temperature, first, window)
            found, left = key, [lse]
        else:
            memory = _ops.memory_scan_kept if keep else _ops.memory_scan
            r, found, *left = memory(query, key, v.unflatten(-1, heads), log_alpha, M0, reset, 1.0)
        gated = gated_read_out(r, h.unflatten(-1, heads), e.unflatten(-1, heads), g_r, g_h, eps).flatten(-2)
        ctx.eps, ctx.orthogonalize, ctx.window = eps, orthogonalize, window
        ctx.set_materialize_grads(False)
        # Of a window's addresses the backward wants what the norms were taken of, of a matrix's the norms.
        kept = (query, key, *(convolved if window else scales), *left) if keep else (None,) * 4 + ((*left,) if window else (None,))
        ctx.save_for_backward(fused, *rest, *gate, *c_gate, logits, c_logits, h, r, *kept)
        return gated, h, h_last, found

    @staticmethod
    def backward(ctx: Any, dgated: Tensor | None, dh: Tensor | None, dh_last: Tensor | None, dfound: Tensor | None) -> Any:
        refuse_second_order("a block", "build the loss from its operators' naive forms")
        fused, *rest = ctx.saved_tensors
        rest, gate, c_gate, (logits, c_logits, h, r, query, key, *normed, left) = rest[:-15], rest[-15:-12], rest[-12:-9], rest[-9:]
        six, log_alpha, decay, context = rest[:6], rest[6], rest[7:11], rest[11:15]
        w_g, g_r, g_h, h0, M0, reset, *gains, temperature, first = rest[15:]
        (W_in, _, _, out_bias), (cW_in, _, _, cout_bias) = decay, context
        dfused = None if fused is None else torch.empty_like(fused)
        q, k, v, z, p, e = six if fused is None else _split(fused, w_g.shape[0])
        dq, dk, dv, dz, dp, de = parts = (
            [torch.empty_like(x) for x in six] if fused is None or dfused is None else _split(dfused, w_g.shape[0])
        )
        heads, relu, wide = (g_r.shape[0], g_r.shape[1]), cW_in is None, torch.promote_types(h.dtype, torch.float32)
        if query is None:
            convolved = _convolved(q, k, gains, reset)
            query, key, *scales = _addresses(*convolved, h, heads)
            normed = [*convolved] if ctx.window else scales
        h_heads = h.unflatten(-1, heads)
        dgated = torch.zeros_like(h) if dgated is None else dgated

        # The way back, operator by operator; what each writes last is what the one before it reads.
        dr, dm = torch.empty_like(r), torch.empty_like(h_heads)
        dg_r, dg_h = torch.empty_like(g_r), torch.empty_like(g_h)
        e_heads, de_heads = e.unflatten(-1, heads), de.unflatten(-1, heads)
        _ops.gated_read_out_bwd_out(dgated.unflatten(-1, heads), r, h_heads, e_heads, g_r, g_h, ctx.eps, dr, dm, de_heads, dg_r, dg_h)
        dlog_alpha, dh_out = torch.empty_like(log_alpha), torch.empty_like(h)
        addressed = (query, key, v.unflatten(-1, heads), log_alpha)
        dq_heads, dk_heads, dv_heads, dh_heads = (gradient.unflatten(-1, heads) for gradient in (dq, dk, dv, dh_out))
        dM0, dtemperature = None, None
        dgains: list[Tensor | None] = [None, None]
        if ctx.window:
            dquery, dkey, dtemperature = torch.empty_like(query), torch.empty_like(key), torch.empty_like(temperature)
            window = (temperature, first, ctx.window)
            _ops.window_attention_bwd_out(dr, r, left, *addressed, *window, dquery, dkey, dv_heads, dlog_alpha, dtemperature)
            dkey = dkey if dfound is None else dkey + dfound
            inputs = [x.unflatten(-1, heads) for x in normed]
            dinputs = [dq_heads, dk_heads] if gains[0] is None else [torch.empty_like(x) for x in inputs]
            _ops.memory_address_bwd_out(dquery, dkey, *inputs, h_heads, *dinputs, dh_heads, dm)
            if gains[0] is not None:
                dgains = [torch.empty_like(gain) for gain in gains]
                for dy, x, gain, dx, dgain in zip(dinputs, (q, k), gains, (dq, dk), dgains, strict=True):
                    _ops.short_convolution_bwd_out(dy.flatten(-2), x, gain, reset, dx, dgain)
        else:
            dM0 = h.new_empty((h.shape[0], heads[0], heads[1], heads[1]), dtype=wide) if M0 is None else torch.empty_like(M0)
            memory = (*addressed, M0, reset, 1.0, left, *normed, dm)
            _ops.addressed_memory_bwd_out(dr, dfound, *memory, dq_heads, dk_heads, dv_heads, dlog_alpha, dM0, dh_heads)
        if dh is not None:
            dh_out = dh_out + (uboo.project_out(dh, dh_out) if ctx.orthogonalize else dh)
        dlogits, dout_bias, dw_g = torch.empty_like(logits), torch.empty_like(out_bias), torch.empty_like(w_g)
        dc_logits, dcout_bias = (None, None) if relu else (torch.empty_like(c_logits), torch.empty_like(cout_bias))
        dh0 = h.new_empty(h[:, 0].shape, dtype=wide) if h0 is None else torch.empty_like(h0)
        scan = (z, p, logits, out_bias, c_logits, cout_bias, w_g, h0, reset, LOG_GAMMA_MIN, LOG_GAMMA_MAX)
        _ops.gated_scan_from_logits_bwd_out(dh_out, dh_last, h, *scan, dz, dp, dlogits, dout_bias, dc_logits, dcout_bias, dw_g, dh0)
        ddecay = (*_gate_backward(dlogits, _Hidden(*gate), z, dz, relu, W_in.dtype), dout_bias)
        dcontext: tuple[Tensor | None, ...] = (None,) * 4
        if dc_logits is not None:
            dcontext = (*_gate_backward(dc_logits, _Hidden(*c_gate), k, dk, relu, W_in.dtype), dcout_bias)
        projections = (dfused, *(parts if fused is None else (None,) * _PARTS))
        states = (None if h0 is None else dh0, None if M0 is None else dM0, None)
        return (None,) * 4 + (*projections, dlog_alpha, *ddecay, *dcontext, dw_g, dg_r, dg_h, *states, *dgains, dtemperature, None)
