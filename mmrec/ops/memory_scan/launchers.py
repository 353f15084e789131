"""Which kernels of `memory_scan` run, and with what: nothing is copied, every tensor goes in with its own strides."""

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from mmrec.ops.launching import Call, blocks, launch, power_of_two, strides
from mmrec.ops.memory_scan.chaining import chain, log_decays, segments_of
from mmrec.ops.memory_scan.kernels import output_kernel, step_kernel, walk_kernel
from mmrec.ops.memory_scan.kernels_backward import gradient_kernel
from mmrec.ops.registration import INTERPRETED
from mmrec.ops.segments import cut
from mmrec.ops.tuning import launch_options

ADDRESSED = 128  # width of a head up to which one program of `gradient_kernel` holds it whole, and can go through the addresses' norms
_FEW_HEADS = 64  # blocks of 128 × 128 of all memories below which a walk over time leaves most of the GPU idle unless they are cut smaller


def head_width(key_width: int, value_width: int) -> int:
    """The wider side of a memory, as the table counts it."""
    return min(max(power_of_two(max(key_width, value_width)), 64), 512)


def _memories(batch_heads: int, key_width: int, value_width: int) -> int:
    """Blocks of 128 × 128 of all memories: how much a walk over time does side by side."""
    return batch_heads * max(1, head_width(key_width, value_width) // 128) ** 2


def _shape_class(tensors: tuple[Tensor, ...], batch_heads: int, key_width: int, value_width: int) -> str:
    """Row of the table: `fp32` (fp32, fp16 and mixed inputs), else the head's width `64` … `512`, `…_few` where few programs walk."""
    if any(tensor.dtype != torch.bfloat16 for tensor in tensors):
        return "fp32"
    few = _memories(batch_heads, key_width, value_width) < _FEW_HEADS
    return f"{head_width(key_width, value_width)}{'_few' if few else ''}"


def covering(width: int, other: int) -> int:
    """The widest tile that one side of a memory needs; a matrix product needs 16.

    Where one side fits 32 and the other does not, both get 64: of `gradient_kernel` and the walk that reads out, with a tile of 32 beside
    one of 64 that hold a whole head, the ptxas of Triton 3.6 makes wrong code for Hopper (dlog α, dv; right with -O0, and by CUDA 13's
    ptxas). The walk that only stores, 64 × 32 of wider heads, was compared and is right. Networks' memories are square.
    """
    return max(16, power_of_two(width), min(64, power_of_two(other)))


class Addresses(NamedTuple):
    """What `gradient_kernel` needs to go on from addresses to what their norms were taken of.

    Attributes:
        q_scale, k_scale: (B, T, H) fp32, the norms' factors.
        dh_more: (B, T, H, K), the gradient that reaches `h` by other ways; None: none does.
        dh: (B, T, H, K), gets the whole of it.
    """

    q_scale: Tensor
    k_scale: Tensor
    dh_more: Tensor | None
    dh: Tensor


class _Scan:
    """One call's inputs, and the kernels that run on them; C and the precision are the same for all kernels of a call.

    bf16 inputs are multiplied by the tensor cores in bf16 and stored memories are bf16; all others are multiplied in IEEE fp32 (a state
    overflows fp16, and TF32 keeps three digits). Triton's interpreter has no bf16 arithmetic.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, reset: Tensor | None, scale: float, tensors: tuple[Tensor, ...]):
        self.log_alpha, self.reset, self.scale = log_alpha, reset, scale
        self.batch, self.time, self.heads, self.K = k.shape
        self.V = v.shape[-1]
        self.widest = {"BK": covering(self.K, self.V), "BV": covering(self.V, self.K)}
        self.device = q.device
        self.shape_class = _shape_class(tensors, self.batch * self.heads, self.K, self.V)
        self.bf16 = self.shape_class != "fp32" and not INTERPRETED

    def plan(self, name: str) -> None:
        """Read the call's chunk length, and whether one kernel walks and reads out at once (K in one block), or two."""
        options = self.options(name)
        self.C, self.fused = options["C"], bool(options["fused"])

    def options(self, kernel: str) -> dict[str, Any]:
        """Of the table, with no tiles wider than the head."""
        options = launch_options(f"memory_scan.{kernel}", self.shape_class, self.device)
        return {**options, **{name: min(options[name], widest) for name, widest in self.widest.items() if name in options}}

    def states_shape(self) -> tuple[int, ...]:
        """(B·H, N, K, V): a memory, or a gradient to it, for every chunk."""
        return self.batch * self.heads, blocks(self.time, self.C), self.K, self.V

    def states_dtype(self) -> torch.dtype:
        """In which they are stored."""
        return torch.bfloat16 if self.bf16 else torch.float32

    def new_states(self) -> Tensor:
        """Room for them."""
        return torch.empty(self.states_shape(), dtype=self.states_dtype(), device=self.device)

    def kept(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of the memories that a forward keeps for its backward: those that enter the chunks, or none, (0,).

        They must come for free, from the walk that reads out, and be what the backward would make: of the same chunks of the same
        segments. Their shape says which these are. Its first number grows with the segments, and only the one chunk of a short sequence
        can be of two lengths, as lengths are powers of two. Plans the forward: the backward's plan comes afterwards.
        """
        self.plan("forward")
        kept = self.fused and self.time > 1 and self.options("backward")["C"] == self.C
        return self.states_shape() if kept else (0,), self.states_dtype()

    def _key(self, reverse: bool) -> tuple[Any, ...]:
        """What a launch depends on beside its tensors."""
        return self.C, self.scale, self.shape_class, reverse

    def _sizes(self) -> tuple[int | float, ...]:
        return self.time, self.heads, self.scale

    def _constants(self) -> dict[str, Any]:
        return {
            "K": self.K,
            "V": self.V,
            "C": self.C,
            "DOT": tl.bfloat16 if self.bf16 else tl.float32,
            "HAS_RESET": self.reset is not None,
        }

    def _gate_strides(self) -> tuple[int, ...]:
        return (*self.log_alpha.stride(), *strides(self.reset, 2))

    def walk(
        self,
        reader: Tensor,
        writer: Tensor,
        value: Tensor,
        initial: Tensor | None,
        output: Tensor | None,
        states: Tensor | None,
        last: Tensor,
        reverse: bool,
    ) -> None:
        """Carry a memory (or, reversed, its gradient) over all chunks; with `output` read it on the way, with `states` store it."""

        def prepare() -> Call:
            if output is None:
                options = self.options("states")
            else:
                options = {**self.options("walk_reverse" if reverse else "walk"), "BK": self.widest["BK"]}
            grid = (blocks(self.V, options["BV"]) * blocks(self.K, options["BK"]) * self.batch * self.heads,)
            inputs = (*reader.stride(), *writer.stride(), *value.stride(), *self._gate_strides())
            numbers = (*inputs, *strides(initial, 4), *strides(output, 4), *last.stride(), *self._sizes())
            flags = {
                "REVERSE": reverse,
                "HAS_OUTPUT": output is not None,
                "HAS_STATES": states is not None,
                "HAS_INITIAL": initial is not None,
            }
            return Call(grid, numbers, self._constants() | flags | options)

        launch(
            walk_kernel, (reader, writer, value, self.log_alpha, self.reset, initial, output, states, last), prepare, *self._key(reverse)
        )

    def read_out(self, reader: Tensor, writer: Tensor, value: Tensor, states: Tensor, output: Tensor, reverse: bool) -> None:
        """All chunks at once from the stored states."""

        def prepare() -> Call:
            options = self.options("output_reverse" if reverse else "output")
            grid = (blocks(self.V, options["BV"]) * states.shape[1] * self.batch * self.heads,)
            inputs = (*reader.stride(), *writer.stride(), *value.stride(), *self._gate_strides())
            return Call(grid, (*inputs, *output.stride(), *self._sizes()), self._constants() | {"REVERSE": reverse} | options)

        launch(output_kernel, (reader, writer, value, self.log_alpha, self.reset, states, output), prepare, *self._key(reverse))

    def gradients(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dr: Tensor,
        M: Tensor,
        dM: Tensor,
        dq: Tensor,
        dk: Tensor,
        dlog_alpha: Tensor,
        addresses: Addresses | None,
    ) -> None:
        """dq, dk and dlog α of all chunks at once; what several blocks of K add to dlog α is summed here, in a fixed order."""
        options = self.options("gradient") if addresses is None else {**self.options("gradient_addressed"), "BK": self.widest["BK"]}
        more: tuple[Tensor | None, ...] = (None,) * 4 if addresses is None else addresses
        key_blocks = blocks(self.K, options["BK"])
        shares = dlog_alpha.unsqueeze(0)
        if key_blocks > 1:
            shares = torch.empty((key_blocks, *dlog_alpha.shape), dtype=torch.float32, device=self.device)

        def prepare() -> Call:
            grid = (key_blocks * M.shape[1] * self.batch * self.heads,)
            inputs = (*q.stride(), *k.stride(), *v.stride(), *dr.stride(), *self._gate_strides())
            outputs = (*dq.stride(), *dk.stride(), *shares.stride())
            addressed = (n for tensor, count in zip(more, (3, 3, 4, 4), strict=True) for n in strides(tensor, count))
            return Call(grid, (*inputs, *outputs, *addressed, *self._sizes()), self._constants() | options)

        launch(gradient_kernel, (q, k, v, dr, self.log_alpha, self.reset, M, dM, dq, dk, shares, *more), prepare, *self._key(False))
        if key_blocks > 1 and dlog_alpha.dtype == torch.float32:
            torch.sum(shares, 0, out=dlog_alpha)
        elif key_blocks > 1:
            dlog_alpha.copy_(shares.sum(0))


def _step(
    scan: _Scan, q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, M0: Tensor | None, reset: Tensor | None, r: Tensor, last: Tensor
) -> None:
    def prepare() -> Call:
        options = scan.options("step")
        grid = (blocks(scan.V, options["BV"]) * scan.batch * scan.heads,)
        without_time = [stride for t in (q, k, v) for stride in (t.stride(0), t.stride(2), t.stride(3))]
        gates = (log_alpha.stride(0), log_alpha.stride(2), 0 if reset is None else reset.stride(0))
        numbers = (*without_time, *gates, *strides(M0, 4), scan.heads, scan.scale)
        flags = {"K": scan.K, "V": scan.V, "HAS_INITIAL": M0 is not None, "HAS_RESET": reset is not None}
        return Call(grid, numbers, flags | options)

    launch(step_kernel, (q, k, v, log_alpha, reset, M0, r, last), prepare, scan.scale)


def _segments(k: Tensor, v: Tensor, *tensors: Tensor | None) -> int:
    """Into how many segments a call is cut; `tensors`: all of its tensors that have a time dimension."""
    batch, time, heads, key_width = k.shape
    return segments_of(time, _memories(batch * heads, key_width, v.shape[-1]), tensors)


def new_memories(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, reset: Tensor | None) -> Tensor:
    """Room for the memories that `launch_forward` of the same tensors keeps, (B·S·H, N, K, V) with N chunks in each of S segments.

    Nothing, (0,), where the backward has to make its own. The strides decide too, which a fake tensor has: torch.compile hands every
    tensor over with those it was traced with (see `registration.register`).
    """
    count = _segments(k, v, q, k, v, log_alpha, reset)
    if count > 1:
        q, k, v, log_alpha = (cut(tensor, count) for tensor in (q, k, v, log_alpha))
    shape, dtype = _Scan(q, k, v, log_alpha, None, 1.0, (q, k, v)).kept()
    return q.new_empty(shape, dtype=dtype)


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    M0: Tensor | None,
    reset: Tensor | None,
    scale: float,
    memories: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`r` (B, T, H, V) in the dtype of `q` and `M_last` (B, H, K, V) fp32, both contiguous; see the public function.

    `memories`, from `new_memories`, get what the backward would have to make again.
    """
    batch, _, heads, key_width = k.shape
    r = output = torch.empty(v.shape, dtype=q.dtype, device=q.device)
    M_last = last = torch.empty((batch, heads, key_width, v.shape[-1]), dtype=torch.float32, device=q.device)
    count = _segments(k, v, q, k, v, log_alpha, reset)
    if count > 1:
        log_decay = log_decays(log_alpha, reset, count)
        q, k, v, log_alpha, output = (cut(tensor, count) for tensor in (q, k, v, log_alpha, r))
        reset = None if reset is None else cut(reset, count)
        M0 = segment_memories(q, k, v, log_alpha, reset, scale, log_decay, M0, M_last, reverse=False)
        last = torch.empty_like(M0)
    scan = _Scan(q, k, v, log_alpha, reset, scale, (q, k, v))
    if scan.time == 1:
        _step(scan, q, k, v, log_alpha, M0, reset, output, last)
        return r, M_last
    scan.plan("forward")
    if scan.fused:
        scan.walk(q, k, v, M0, output, memories, last, reverse=False)
    else:
        states = scan.new_states()
        scan.walk(q, k, v, M0, None, states, last, reverse=False)
        scan.read_out(q, k, v, states, output, reverse=False)
    return r, M_last


def segment_memories(
    reader: Tensor,
    writer: Tensor,
    value: Tensor,
    log_alpha: Tensor,
    reset: Tensor | None,
    scale: float,
    log_decay: Tensor,
    initial: Tensor | None,
    last: Tensor,
    reverse: bool,
) -> Tensor:
    """The memory (reversed, its gradient) that enters each segment of already cut tensors; see `chaining.chain`."""
    scan = _Scan(reader, writer, value, log_alpha, reset, scale, (reader, writer, value))
    scan.plan("backward" if reverse else "forward")
    left = torch.empty((scan.batch, scan.heads, scan.K, scan.V), dtype=torch.float32, device=value.device)
    scan.walk(reader, writer, value, None, None, None, left, reverse=reverse)
    return chain(left, log_decay, initial, last, reverse)


def launch_backward(
    dr: Tensor,
    dM_last: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    M0: Tensor | None,
    reset: Tensor | None,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dlog_alpha: Tensor,
    dM0: Tensor,
    memories: Tensor | None = None,
    addresses: Addresses | None = None,
) -> None:
    """Gradients into the five given tensors, of any strides and dtypes; with `addresses`, dq and dk before their norms, and dh.

    The forward's memories are computed again where `memories` are not given, or not those of the segments and chunks that are used here:
    the backward has more tensors than the forward, and if one of them cannot be cut, none is.
    """
    long = (dr, q, k, v, log_alpha, dq, dk, dv, dlog_alpha)
    count = _segments(k, v, *long, reset, *(addresses or ()))
    if count > 1:
        log_decay = log_decays(log_alpha, reset, count)
        dr, q, k, v, log_alpha, dq, dk, dv, dlog_alpha = (cut(tensor, count) for tensor in long)
        reset = None if reset is None else cut(reset, count)
        if addresses is not None:
            q_scale, k_scale, dh_more, dh = addresses
            dh_more = None if dh_more is None else cut(dh_more, count)
            addresses = Addresses(cut(q_scale, count), cut(k_scale, count), dh_more, cut(dh, count))
    scan = _Scan(q, k, v, log_alpha, reset, scale, (q, k, v, dr))
    if memories is not None and (memories.numel() == 0 or (tuple(memories.shape), memories.dtype) != scan.kept()):
        memories = None
    if count > 1:
        if memories is None:
            M0 = segment_memories(q, k, v, log_alpha, reset, scale, log_decay, M0, torch.empty_like(dM0), reverse=False)
        dM_last = segment_memories(k, q, dr, log_alpha, reset, scale, log_decay, dM_last, dM0, reverse=True)
        dM0 = torch.empty_like(dM_last)
    scan.plan("backward")
    dM = scan.new_states()
    if memories is None:
        memories = scan.new_states()
        scan.walk(q, k, v, M0, None, memories, torch.empty_like(dM0), reverse=False)
    scan.walk(k, q, dr, dM_last, dv if scan.fused else None, dM, dM0, reverse=True)
    if not scan.fused:
        scan.read_out(k, q, dr, dM, dv, reverse=True)
    scan.gradients(q, k, v, dr, memories, dM, dq, dk, dlog_alpha, addresses)
