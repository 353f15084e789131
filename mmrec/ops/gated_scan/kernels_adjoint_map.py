"""Triton kernel of `gated_scan`'s backward over segments: what a segment does to the adjoint that passes through it."""

import triton
import triton.language as tl

from mmrec.ops.gated_scan.formula import sigmoid_of_scaled
from mmrec.ops.gated_scan.kernels_forward import decay_of, jacobian, rows_of
from mmrec.ops.primitives import LOG2E


@triton.jit(do_not_specialize=["T", "reset_stride_B"])
def adjoint_map_kernel(
    dh_ptr,
    h_ptr,
    z_ptr,
    p_ptr,
    decay_ptr,
    w_g_ptr,
    before_ptr,
    reset_ptr,
    bias_ptr,
    context_ptr,
    context_bias_ptr,
    offset_ptr,
    product_ptr,
    T,
    D: tl.constexpr,
    group,
    dh_stride_B,
    dh_stride_T,
    dh_stride_D,
    h_stride_B,
    h_stride_T,
    h_stride_D,
    z_stride_B,
    z_stride_T,
    z_stride_D,
    p_stride_B,
    p_stride_T,
    p_stride_D,
    decay_stride_B,
    decay_stride_T,
    decay_stride_D,
    w_g_stride,
    reset_stride_B,
    reset_stride_T,
    bias_stride,
    context_stride_B,
    context_stride_T,
    context_stride_D,
    context_bias_stride,
    least,
    greatest,
    least_lost,
    greatest_lost,
    BD: tl.constexpr,
    LEVELS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_RESET: tl.constexpr,
    LOGITS: tl.constexpr,
    HAS_CONTEXT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One program: BD channels of one segment, a tile of 2^LEVELS tokens after the other.

    The adjoint before the first token, f_0 = J_1 (dh_1 + J_2 (dh_2 + …)), is Σ_t P_t dh_t + P_T f_T with P_t = J_1 … J_t: both sums
    run forwards in time, beside each other, and nothing has to be scanned. `offset`, `product` and `before`, the state before the
    first token, are (B, D), contiguous fp32.
    """
    ROWS: tl.constexpr = 1 << LEVELS
    stripes = tl.cdiv(D, BD)
    batch = (tl.program_id(0) // stripes).to(tl.int64)
    channel = (tl.program_id(0) % stripes) * BD + tl.arange(0, BD).to(tl.int64)
    inside = channel < D
    row = tl.arange(0, ROWS)[:, None]
    dh_row = dh_ptr + batch * dh_stride_B + channel * dh_stride_D
    h_row = h_ptr + batch * h_stride_B + channel * h_stride_D
    z_row = z_ptr + batch * z_stride_B + channel * z_stride_D
    p_row = p_ptr + batch * p_stride_B + (channel // group) * p_stride_D
    decay_row = decay_ptr + batch * decay_stride_B + channel * decay_stride_D
    w_scaled = tl.load(w_g_ptr + channel * w_g_stride, mask=inside, other=0.0).to(tl.float32) * -LOG2E
    biases = (w_scaled, w_scaled)  # of gates that there are not
    bounds = (least, greatest, least_lost, greatest_lost)
    if LOGITS:
        bias = tl.load(bias_ptr + channel * bias_stride, mask=inside, other=0.0).to(tl.float32) * -LOG2E
        biases = (bias, bias)
    if HAS_CONTEXT:
        context_row = context_ptr + batch * context_stride_B + channel * context_stride_D
        context_bias = tl.load(context_bias_ptr + channel * context_bias_stride, mask=inside, other=0.0).to(tl.float32) * -LOG2E
        biases = (biases[0], context_bias)
    if HAS_RESET:
        reset_row = reset_ptr + batch * reset_stride_B
    previous = tl.load(before_ptr + batch * D + channel, mask=inside, other=0.0)
    offset = tl.zeros([BD], tl.float32)
    product = tl.full([BD], 1.0, tl.float32)

    for start in tl.range(0, T, ROWS, num_stages=STAGES):
        valid = inside[None, :] & (row < T - start)
        dhs = rows_of(tl.load(dh_row[None, :] + row * dh_stride_T, mask=valid, other=0.0), ROWS, BD, LEVELS)
        hs = rows_of(tl.load(h_row[None, :] + row * h_stride_T, mask=valid, other=0.0), ROWS, BD, LEVELS)
        zs = rows_of(tl.load(z_row[None, :] + row * z_stride_T, mask=valid, other=0.0), ROWS, BD, LEVELS)
        ps = rows_of(tl.load(p_row[None, :] + row * p_stride_T, mask=valid, other=0.0), ROWS, BD, LEVELS)
        decays = rows_of(tl.load(decay_row[None, :] + row * decay_stride_T, mask=valid, other=0.0), ROWS, BD, LEVELS)
        contexts = decays
        if HAS_CONTEXT:
            contexts = rows_of(tl.load(context_row[None, :] + row * context_stride_T, mask=valid, other=0.0), ROWS, BD, LEVELS)
            context_row += ROWS * context_stride_T
        bits = 0
        if HAS_RESET:
            starts = tl.load(reset_row + tl.arange(0, ROWS) * reset_stride_T, mask=tl.arange(0, ROWS) < T - start, other=0)
            bits = tl.sum((starts != 0).to(tl.int32) << tl.arange(0, ROWS), axis=0)
            reset_row += ROWS * reset_stride_T
        for j in tl.static_range(ROWS):
            gamma, write = decay_of(decays[j], contexts[j], biases, bounds, LOGITS, HAS_CONTEXT, INTERPRETED)
            gate = sigmoid_of_scaled(w_scaled * previous - ps[j].to(tl.float32) * LOG2E, INTERPRETED)
            factor = jacobian(gamma, write * zs[j].to(tl.float32), gate, w_scaled)
            if HAS_RESET:
                factor = tl.where((bits >> j) & 1 != 0, 0.0, factor)
            product *= tl.where(start + j < T, factor, 1.0)
            offset += product * dhs[j].to(tl.float32)
            previous = hs[j].to(tl.float32)
        dh_row += ROWS * dh_stride_T
        h_row += ROWS * h_stride_T
        z_row += ROWS * z_stride_T
        p_row += ROWS * p_stride_T
        decay_row += ROWS * decay_stride_T

    tl.store(offset_ptr + batch * D + channel, offset, mask=inside)
    tl.store(product_ptr + batch * D + channel, product, mask=inside)
