"""The step of decoding with everything in fixed places, so that one CUDA graph replays it for every token.

Shapes: token ids (B,) int64; logits (B, vocab_size) in the weights' dtype; the state of each layer, h (B, D) and M (B, H, K, V), in fp32
(float64 for a float64 network), or a window's tokens in M's place. Neither the time of a step nor the memory depends on how much was read.
"""

from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmrec.core.memory import BlockState, copy_state
from mmrec.decoding.rings import Ring
from mmrec.decoding.support import unsupported
from mmrec.model import MMRecModel

if TYPE_CHECKING:
    from mmrec.decoding.fused_step import FusedStep

# Sequences up to which the fused step is the faster one: 4.4 ms for two, where the modules took 5.6 for one and 6.2 for eight, but 7.0 for
# four (7B on an H200).
FASTER = 2
_WARM_UPS = 2  # steps before the capture: the first compiles, the second shows that nothing is left to be set up


def _fused_step(model: MMRecModel, state: list[BlockState], logits: Tensor) -> "FusedStep":
    from mmrec.decoding.fused_step import FusedStep  # Triton exists on Linux alone

    return FusedStep(model, state, logits)


class Decoder:
    """Decodes B sequences, token by token, from the state that reading a prompt has left.

    On CUDA a step is one replay of a graph, captured here: `FusedStep` where the network and the batch allow it, else `model.step`. On a
    CPU the same runs without a graph. Either reads the parameters where they lay at construction: values that training changes in place
    count from the next step on; parameters that were replaced (`model.to`, `set_hem`, assigning `.data`) do not, and need a new decoder.
    The fused step calls no module, so hooks and compiled blocks do not run in it, and autocast does not reach it.

    Args:
        model: a network in evaluation mode.
        batch_size: B.
        fused: whether the kernels of `FusedStep` run; None: where they can and are faster.
        greedy: each step also writes the most likely next token into `tokens`, so that `advance` goes on from there.

    Attributes:
        logits: (B, vocab_size), of the token after the last one given; the next step overwrites them.
        tokens: (B,) int64, the token last read; with `greedy` the one to be read next.
        fused: whether `FusedStep` runs.
        reason: why not; empty where it does.

    Raises:
        ValueError: for a `batch_size` below 1; for `fused=True` where that cannot be.
    """

    @torch.inference_mode()
    def __init__(self, model: MMRecModel, batch_size: int = 1, *, fused: bool | None = None, greedy: bool = False) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give at least 1")
        self.reason = "not asked for" if fused is False else unsupported(model, batch_size)
        if fused is None and not self.reason and batch_size > FASTER and model.embedding.weight.is_cuda:
            self.reason = f"{batch_size} sequences: faster with the tensor cores"
        if fused and self.reason:
            raise ValueError(f"the fused step cannot run: {self.reason}")
        weight = model.embedding.weight
        self.fused = not self.reason
        self.logits = torch.zeros(batch_size, model.config.vocab_size, dtype=weight.dtype, device=weight.device)
        self.tokens = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)
        self._state = model.init_state(batch_size)
        self._model: MMRecModel | None = model
        self._greedy = greedy
        self._step: FusedStep | None = None
        if self.fused:
            self._state = [own._replace(window=None, recent=None) for own in self._state]  # it has rings
            self._step = _fused_step(model, self._state, self.logits)
        self._graph: torch.cuda.CUDAGraph | None = None
        if weight.is_cuda:
            self._capture(weight.device)

    @property
    def state(self) -> list[BlockState]:
        """One `BlockState` a layer, overwritten by every step, but for the fused step's windows, which a look copies from its rings."""
        return [own if ring is None else own._replace(window=ring.state(), recent=ring.recent_tokens()) for own, ring in self._layers()]

    @torch.inference_mode()
    def load(self, state: list[BlockState]) -> None:
        """Start from a state, one `BlockState` a layer for B sequences; it is copied.

        Raises:
            ValueError: for a state of another number of layers or of another shape.
        """
        own = self.state
        if len(state) != len(own):
            raise ValueError(f"state has {len(state)} layers, the network {len(own)}; give one BlockState a layer")
        copy_state(own, state)
        for layer, (_, ring) in zip(own, self._layers(), strict=True):
            if ring is not None and layer.window is not None:
                ring.load(layer.window, layer.recent)

    @torch.inference_mode()
    def step(self, token_ids: Tensor) -> Tensor:
        """Read one token, (B,) int64; returns `self.logits`, which the next step overwrites."""
        self.tokens.copy_(token_ids)
        self.advance()
        return self.logits

    @torch.inference_mode()
    def advance(self) -> None:
        """Read `self.tokens`: after `step` and with `greedy` a token further each time. Does not wait for the device."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._run()

    def close(self) -> None:
        """Give back the graph's memory and the buffers; the decoder is of no use afterwards."""
        if self._graph is not None:
            self._graph.reset()
        self._graph = self._step = self._model = None
        self._state = []

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _layers(self) -> list[tuple[BlockState, Ring | None]]:
        """Of every layer what lies in fixed places; a ring in the place of a window where the fused step runs."""
        rings: list[Ring | None] = [None] * len(self._state) if self._step is None else self._step.rings
        return list(zip(self._state, rings, strict=True))

    def _run(self) -> None:
        if self._step is not None:
            self._step(self.tokens)
        else:
            if self._model is None:
                raise RuntimeError("the decoder is closed; make a new one")
            logits, after = self._model.step(self.tokens, self.state)
            self.logits.copy_(logits)
            self.load(after)
        if self._greedy:
            torch.argmax(self.logits, dim=-1, out=self.tokens)

    def _capture(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    self._run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._run()
            self._graph = graph
        for own, ring in self._layers():
            for tensor in own.kept():
                tensor.zero_()
            if ring is not None:
                ring.clear()
        self.tokens.zero_()
