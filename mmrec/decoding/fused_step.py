"""One token through the network in seven kernels a layer, each a pass over weights that are read once (`kernels.py`).

| kernel | reads of the weights | makes |
| --- | --- | --- |
| `projection` | `W_fused`, `w_α` | `q, k, v, z, p, e` of `RMSNorm(x)`, (B, 5D+P); the heads' decay logits, (B, H) fp32 |
| `gates_in` | `W_in` of both gates (`W_down`) | their hidden layers, (B, 2, D/4), GELU; with DPG (B, R), ReLU |
| `short_term` | `W_out` of both gates (`W_up`), `w_g` | `h`, (B, D) fp32, in place |
| `memory` | `g_r`, `g_h` | `M`, (B, H, K, V) fp32, in place; the gated read-out, (B, D) |
| `window` | `g_r`, `g_h`, `convolution` | in the memory's place where a layer has one: a token in `rings.Ring`; the gated read-out |
| `out` | `W_o` | `x + W_o y` |
| `gate_up` | `W_gate_up` | `SiLU(gate) · up` of `RMSNorm(x)`, (B, F) |
| `down` | `W_down` | `x + W_down y` |

and, around the layers, the embedding's look-up and `head`: the logits of `RMSNorm(x)`, (B, vocab). Activations have the weights' dtype
and are rounded to it where the modules' forward rounds them, but for the normed inputs, which stay in fp32 within a kernel.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mmrec.blocks.hem import FusedProjections
from mmrec.blocks.mm_rec_block import MMRecBlock
from mmrec.core.decay import LOG_GAMMA_MAX, LOG_GAMMA_MIN
from mmrec.core.memory import BlockState
from mmrec.decoding import kernels
from mmrec.decoding.kernels_window import window_kernel
from mmrec.decoding.rings import Ring
from mmrec.decoding.tiles import dependent_launch, memory_options, product_options, window_options
from mmrec.model import MMRecModel
from mmrec.ops.launching import blocks, power_of_two


class Launch(NamedTuple):
    """A kernel with all it is called with.

    Attributes:
        name: its row of the table of tiles.
        kernel: the function under `triton.jit`.
        grid: programs.
        arguments: tensors, None and numbers, in order.
        named: its constants and launch options.
    """

    name: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    named: dict[str, Any]

    def run(self) -> None:
        """On the current stream."""
        self.kernel[self.grid](*self.arguments, **self.named)


def _words(tensor: Tensor) -> Tensor:
    """The same memory as words of 32 bits."""
    return tensor.detach().view(torch.int32)


class FusedStep:
    """The step of a network for a fixed batch, with its buffers; it reads the parameters' memory as it is when it runs.

    Args:
        model: a network for which `support.unsupported` has nothing to say.
        state: of every layer, fp32, contiguous; `h` and `M` are changed in place by every call, `window` and `recent` not looked at.
        logits: (B, vocab_size) in the weights' dtype, written by every call.
        dependent: let kernels start early (`tiles.dependent_launch`); None: where the device can.

    Attributes:
        rings: of every layer, the window's tokens, empty at first; None where it has a matrix.
    """

    def __init__(self, model: MMRecModel, state: list[BlockState], logits: Tensor, dependent: bool | None = None) -> None:
        config, weight = model.config, model.embedding.weight
        dim, batch = config.model_dim, logits.shape[0]
        self.config, self.batch, self.eps = config, batch, config.norm_eps
        self.packed = weight.itemsize == 2
        self.dependent = dependent_launch(weight.device) if dependent is None else dependent
        self._embedding = weight.detach()

        def buffer(*shape: int, dtype: torch.dtype = weight.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=weight.device)

        # Two residual streams in turn: a kernel never writes what another program of it, or the kernel before, still reads.
        self.x, self.x_mid = buffer(batch, dim), buffer(batch, dim)
        self.parts = buffer(batch, -(-(5 * dim + config.pe_width) // 16) * 16)  # rows of whole words, well aligned
        hidden = config.dpg_rank if config.use_dpg else max(1, dim // 4)
        self.hidden = buffer(batch, 1 if config.use_dpg else 2, hidden)
        self.alpha_logits = buffer(batch, config.heads, dtype=torch.float32)
        self.r = buffer(batch, dim, dtype=torch.float32)
        self.arrived = buffer(batch * config.heads, dtype=torch.int32)
        self.y = buffer(batch, dim)
        self.inner = buffer(batch, config.ffn_width)

        self.rings: list[Ring | None] = [
            Ring(config, batch, weight.dtype, weight.device) if config.has_window(index) else None for index in range(config.num_layers)
        ]
        self.launches: list[Launch] = []
        for block, own, ring in zip(model.blocks, state, self.rings, strict=True):
            self.launches += self._layer(cast(MMRecBlock, block), own, ring)
        self.launches.append(self._product("head", self.x, model.head.weight, logits, norm=model.norm))

    def __call__(self, tokens: Tensor) -> None:
        """Step with `tokens`, (B,) int64, in place: the state and the logits are changed."""
        torch.index_select(self._embedding, 0, tokens, out=self.x)
        self.x.mul_(self.config.input_scale)
        for launch in self.launches:
            launch.run()

    def _part(self, name: str) -> Tensor:
        """A part of the fused projection, (B, D) or (B, P)."""
        dim, pe = self.config.model_dim, self.config.pe_width
        offset = {"q": 0, "k": dim, "v": 2 * dim, "z": 3 * dim, "p": 4 * dim, "e": 4 * dim + pe}[name]
        return self.parts[:, offset : offset + (pe if name == "p" else dim)]

    def _layer(self, block: MMRecBlock, state: BlockState, ring: Ring | None) -> list[Launch]:
        """A block's kernels, from `self.x` to `self.x`."""
        projections, mdi = block.projections, block.mdi
        assert isinstance(projections, FusedProjections)
        fused = projections.W_fused
        z, k = self._part("z"), self._part("k")
        if mdi.use_dpg:
            gates_in = self._product("gates_in", z, mdi.W_down.weight, self.hidden[:, 0], bias=mdi.W_down.bias, activation="relu")
        else:
            first, second = mdi.decay_mlp.W_in, mdi.context_mlp.W_in
            gates_in = self._product(
                "gates_in", z, first.weight, self.hidden[:, 0], bias=first.bias, twin=(k, second, self.hidden[:, 1]), activation="gelu"
            )
        return [
            self._product("projection", self.x, fused.weight, self.parts, bias=fused.bias, norm=block.norm, alpha=block.head_decay.w_alpha),
            gates_in,
            self._short_term(block, state),
            self._memory(block, state) if ring is None else self._window(block, state, ring),
            self._product("out", self.y, block.W_o.weight, self.x_mid, residual=self.x),
            self._product("gate_up", self.x_mid, block.ffn.W_gate_up.weight, self.inner, norm=block.ffn_norm, activation="swiglu"),
            self._product("down", self.inner, block.ffn.W_down.weight, self.x, residual=self.x_mid),
        ]

    def _launch(self, name: str, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], named: dict[str, Any]) -> Launch:
        return Launch(name, kernel, grid, arguments, named | {"PDL": self.dependent, "launch_pdl": self.dependent})

    def _product(
        self,
        name: str,
        x: Tensor,
        weight: Tensor,
        y: Tensor,
        *,
        bias: Tensor | None = None,
        norm: nn.Module | None = None,
        residual: Tensor | None = None,
        twin: tuple[Tensor, nn.Linear, Tensor] | None = None,
        alpha: Tensor | None = None,
        activation: str = "",
    ) -> Launch:
        """`y = residual + f(W RMSNorm(x) + bias)`; `twin`: the same for another input, layer and output."""
        w, x_words = _words(weight), _words(x)
        outputs = w.shape[0] // (2 if activation == "swiglu" else 1)
        twin_x, twin_w, twin_bias, twin_y = (None, None, None, y) if twin is None else (twin[0], twin[1].weight, twin[1].bias, twin[2])
        tensors = (
            x_words,
            None if norm is None else _words(cast(Tensor, norm.weight)),
            w,
            None if bias is None else bias.detach(),
            residual,
            None if twin_x is None else _words(twin_x),
            None if twin_w is None else _words(twin_w),
            None if twin_bias is None else twin_bias.detach(),
            None if alpha is None else alpha.detach(),
            y,
            None if alpha is None else self.alpha_logits,
        )
        strides = (x_words.stride(0), 0 if residual is None else residual.stride(0), y.stride(0))
        numbers = (outputs, w.shape[1], self.config.heads, *strides, twin_y.storage_offset() - y.storage_offset(), self.eps)
        options = product_options(name, outputs, w.shape[1], self.batch)
        heads = 0 if alpha is None else alpha.shape[0]
        constants = {"ACTIVATION": activation, "HEAD_PROGRAMS": heads, "B": self.batch, "PACKED": self.packed}
        grid = (heads + blocks(outputs, options["R"]), 1 if twin is None else 2)
        return self._launch(name, kernels.product_kernel, grid, (*tensors, *numbers), constants | options)

    def _short_term(self, block: MMRecBlock, state: BlockState) -> Launch:
        config, mdi = self.config, block.mdi
        z, p, hidden = self._part("z"), self._part("p"), _words(self.hidden)
        gates: tuple[Tensor | None, ...]
        if mdi.use_dpg:
            gates = (hidden[:, 0], _words(mdi.W_up.weight), mdi.up_bias.bias.detach(), None, None, None)
        else:
            gates = tuple(
                tensor
                for index, mlp in enumerate((mdi.decay_mlp, mdi.context_mlp))
                for tensor in (hidden[:, index], _words(mlp.W_out.weight), mlp.out_bias.bias.detach())
            )
        dim, words = config.model_dim, hidden.shape[-1]
        numbers = (dim, words, dim // config.pe_width, hidden.stride(0), self.parts.stride(0), LOG_GAMMA_MIN, LOG_GAMMA_MAX)
        options = product_options("short_term", dim, words, self.batch)
        tensors = (*gates, z, p, block.state_gate.w_g.detach(), state.h)
        constants = {"B": self.batch, "PACKED": self.packed}
        grid = (blocks(dim, options["R"]),)
        return self._launch("short_term", kernels.short_term_kernel, grid, (*tensors, *numbers), constants | options)

    def _memory(self, block: MMRecBlock, state: BlockState) -> Launch:
        config, decay = self.config, block.head_decay
        inputs = tuple(self._part(name) for name in "qkve")
        decays = (self.alpha_logits, decay.dt_bias.detach(), decay.A_log.detach())
        tensors = (*inputs, *decays, state.h, state.M, block.g_r.detach(), block.g_h.detach(), self.r, self.arrived, self.y)
        options = memory_options(config.head_dim)
        slices = blocks(config.head_dim, options["BV"])
        numbers = (config.heads, config.head_dim, self.parts.stride(0), self.eps)
        grid = (self.batch * config.heads * slices,)
        return self._launch("memory", kernels.memory_kernel, grid, (*tensors, *numbers), options | {"SLICES": slices})

    def _window(self, block: MMRecBlock, state: BlockState, ring: Ring) -> Launch:
        config, decay = self.config, block.head_decay
        assert block.temperature is not None
        keys, values = _words(ring.k), _words(ring.v)
        heads, words = self.batch * config.heads, keys.shape[-1]
        options = window_options(config.head_dim, words, config.window, heads)
        inputs = tuple(self._part(name) for name in "qkve")
        decays = (self.alpha_logits, decay.dt_bias.detach(), decay.A_log.detach(), block.temperature.log_temperature.detach())
        gains = (None, None) if block.convolution is None else tuple(gain.detach() for gain in block.convolution.gains())
        slots = (keys, values, ring.log_alpha, ring.decay, ring.position, ring.recent, ring.recent_position, *gains)
        shapes = ((heads, options["SPLITS"], config.head_dim), (heads, 2, options["SPLITS"]))
        scratch = (*(torch.zeros(shape, dtype=torch.float32, device=keys.device) for shape in shapes), self.arrived)
        tensors = (*inputs, *decays, state.h, *slots, block.g_r.detach(), block.g_h.detach(), *scratch, self.y)
        numbers = (config.heads, config.head_dim, config.window, config.window_conv, words, self.parts.stride(0), self.eps)
        grid = (heads * options["SPLITS"],)
        constants = {"BJ": power_of_two(config.window_conv), "PACKED": self.packed}
        return self._launch("window", window_kernel, grid, (*tensors, *numbers), options | constants)
