"""Which kernels of `window_attention` run, and with what: nothing as wide as a head is copied, all goes in with its own strides."""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from mmrec.ops.launching import Call, blocks, launch, power_of_two
from mmrec.ops.memory_scan.launchers import covering, head_width
from mmrec.ops.registration import INTERPRETED
from mmrec.ops.sums import add_parts
from mmrec.ops.tuning import launch_options
from mmrec.ops.window_attention.decays import launch_decays
from mmrec.ops.window_attention.kernels import forward_kernel
from mmrec.ops.window_attention.kernels_keys import keys_kernel
from mmrec.ops.window_attention.kernels_queries import queries_kernel
from mmrec.ops.window_attention.pytorch import decay_gradients


class _Call:
    """One call's sizes, and what its kernels share.

    bf16 inputs are multiplied by the tensor cores in bf16; all others in IEEE fp32, as in `memory_scan`.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, window: int, tensors: tuple[Tensor, ...]):
        self.batch, self.time, self.heads, self.K = q.shape
        self.length, self.V, self.window, self.device = k.shape[1], v.shape[-1], window, q.device
        narrow = all(tensor.dtype == torch.bfloat16 for tensor in tensors)
        # Row of the table: `fp32` (fp32, fp16 and mixed inputs), else the head's width `64` … `512`.
        self.shape_class = str(head_width(self.K, self.V)) if narrow else "fp32"
        self.dot = tl.bfloat16 if narrow and not INTERPRETED else tl.float32
        self.key = (window, self.shape_class)

    def constants(self, kernel: str) -> dict[str, Any]:
        """Of the table, with no tiles wider than the head or longer than the sequence."""
        options = launch_options(f"window_attention.{kernel}", self.shape_class, self.device)
        most = {
            "BM": max(16, power_of_two(self.time)),
            "BN": max(16, power_of_two(self.length)),
            "BK": covering(self.K, self.V),
            "BV": covering(self.V, self.K),
        }
        return {"K": self.K, "V": self.V, "DOT": self.dot} | options | {name: min(options[name], size) for name, size in most.items()}

    def sizes(self) -> tuple[int, ...]:
        """The last numbers of every kernel."""
        return self.time, self.length, self.heads, self.window

    def numbers_of(self, *shape: int) -> Tensor:
        """Room for fp32 numbers."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, temperature: Tensor, first: Tensor | None, window: int
) -> tuple[Tensor, Tensor]:
    """`r` (B, T, H, V) in the dtype of `v` and the scores' log-sum-exp (B, H, T) fp32, both contiguous; see the public function."""
    call = _Call(q, k, v, window, (q, k, v))
    r = torch.empty((*q.shape[:3], call.V), dtype=v.dtype, device=v.device)
    lse = call.numbers_of(call.batch, call.heads, call.time)

    constants = call.constants("forward")
    group = _group(constants)
    c, local = launch_decays(log_alpha, group["G"])

    def prepare() -> Call:
        grid = (blocks(call.V, constants["BV"]) * blocks(call.time, constants["BM"]) * call.batch * call.heads,)
        numbers = (*q.stride(), *k.stride(), *v.stride(), *temperature.stride(), *r.stride(), local.shape[-1], *call.sizes())
        return Call(grid, numbers, constants | group)

    first = None if first is None else first.contiguous()
    launch(forward_kernel, (q, k, v, c, local, temperature, first, r, lse), prepare, *call.key)
    return r, lse


def launch_backward(
    dr: Tensor,
    r: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    temperature: Tensor,
    first: Tensor | None,
    window: int,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dlog_alpha: Tensor,
    dtemperature: Tensor,
) -> None:
    """Gradients into the five given tensors, of any strides and dtypes."""
    call = _Call(q, k, v, window, (q, k, v, dr))
    lse = lse.contiguous()
    first = None if first is None else first.contiguous()
    others = call.numbers_of(call.batch, call.heads, call.time)
    later = call.numbers_of(call.batch, call.heads, call.length)
    of_queries, of_keys = call.constants("queries"), call.constants("keys")
    group = _group(of_queries, of_keys)
    c, local = launch_decays(log_alpha, group["G"])
    # Rows of whole tiles: each of them is read in vectors.
    padded = blocks(call.time, of_keys["BM"]) * of_keys["BM"]
    delta, shift = (call.numbers_of(call.batch, call.heads, padded) for _ in range(2))
    query_blocks, k_blocks = blocks(call.time, of_queries["BM"]), blocks(call.K, of_queries["BK"])
    parts = call.numbers_of(call.batch * query_blocks * k_blocks, call.heads)

    def queries() -> Call:
        grid = (k_blocks * query_blocks * call.batch * call.heads,)
        inputs = (*q.stride(), *k.stride(), *v.stride(), *dr.stride(), *r.stride(), *temperature.stride())
        return Call(grid, (*inputs, *dq.stride(), local.shape[-1], padded, *call.sizes()), of_queries | group)

    def keys() -> Call:
        shares = max(blocks(call.K, of_keys["BK"]), blocks(call.V, of_keys["BV"]))
        grid = (shares * blocks(call.length, of_keys["BN"]) * call.batch * call.heads,)
        inputs = (*q.stride(), *k.stride(), *v.stride(), *dr.stride(), *temperature.stride())
        return Call(grid, (*inputs, *dk.stride(), *dv.stride(), padded, *call.sizes()), of_keys | group | {"PARTS": shares})

    tensors = (q, k, v, dr, r, c, local, temperature, first, lse, dq, delta, others, shift, parts)
    launch(queries_kernel, tensors, queries, *call.key)
    ends = None if first is None else _ends_of_queries(first, call.length, of_keys["BN"])
    launch(keys_kernel, (q, k, v, dr, c, temperature, first, ends, shift, delta, others, dk, dv, later), keys, *call.key)
    add_parts(parts, dtemperature)
    dlog_alpha.copy_(decay_gradients(others, later))


def _group(*constants: dict[str, Any]) -> dict[str, int]:
    """The tokens of a group of fp32 decays, as the kernels' constant: tiles are powers of two, so that the longest is a multiple of all."""
    return {"G": max(options[tile] for options in constants for tile in ("BM", "BN"))}


def _ends_of_queries(first: Tensor, length: int, block: int) -> Tensor:
    """(B, 2, N) int32: the query after the last that sees a key of each block, and after the last that sees its first.

    What later queries see never begins earlier.
    """
    begin = torch.arange(0, length, block, dtype=torch.int32, device=first.device)
    bounds = torch.cat([begin + (block - 1), begin]).expand(first.shape[0], -1).contiguous()
    return torch.searchsorted(first, bounds, right=True, out_int32=True)
