"""Loss and gradients of a micro-batch as one CUDA graph: what the host would launch one by one, in thousands, is one launch.

A block is some hundred kernels, forward and backward, and below two billion parameters a GPU runs them faster than Python can ask for
them. A graph replays what was captured: the same memory, whatever lies in it. So batches are copied into fixed tensors, gradients stay
where they are from step to step, and a batch of another shape gets a graph of its own.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_modules.skipping import spoiled_unless_finite
from mmrec.model import LossOutput, MMRecModel

WARMUP = 2  # micro-batches of a kind that run without a graph first: kernels are compiled and libraries make their workspaces
_NAMES = ("input_ids", "labels", "reset")


class _Captured(NamedTuple):
    """A graph, the tensors it reads a batch from, and those it leaves the losses in."""

    graph: torch.cuda.CUDAGraph
    batch: dict[str, Tensor]
    output: LossOutput


class GraphedStep:
    """Forward and backward of a network's training loss, replayed.

    The gradients of the first micro-batch of a step replace those of the last step, later ones are added. Between steps others may clear
    or replace `.grad`, between micro-batches they may not. While a shape is captured, no other loss of these parameters may be alive with
    its autograd graph: its nodes belong to another stream.

    Args:
        network: its parameters keep their memory for as long as this lives.
    """

    def __init__(self, network: MMRecModel) -> None:
        self.network = network
        self._captured: dict[Any, _Captured] = {}
        self._seen: dict[Any, int] = {}
        self._gradients: dict[Tensor, Tensor] = {}  # by parameter, in the graphs' memory
        self._pool: Any = None
        weight = network.embedding.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        self._lambda_P = torch.tensor(network.lambda_P, dtype=wide, device=weight.device)

    def run(self, batch: Mapping[str, Tensor], first: bool, scale: float) -> LossOutput:
        """The losses of a micro-batch, detached; `scale` times its gradients are in `.grad`.

        Args:
            batch: as `MMRecModel.loss` takes it, on the network's GPU.
            first: whether it is the first of a step.
            scale: 1 over the micro-batches of a step.

        Raises:
            RuntimeError: where the step cannot be captured.
        """
        given = {name: batch[name] for name in _NAMES if name in batch}
        key = (first, scale, *((name, tensor.shape, tensor.dtype) for name, tensor in given.items()))
        self._lambda_P.fill_(self.network.lambda_P)
        for parameter, gradient in self._gradients.items():
            parameter.grad = gradient  # Lightning sets it to None before every validation; an optimiser would then skip the parameter
        captured = self._captured.get(key)
        if captured is None and self._seen.get(key, 0) < WARMUP:
            self._seen[key] = self._seen.get(key, 0) + 1
            return self._eager(given, first, scale)
        if captured is None:
            captured = self._captured[key] = self._capture(given, first, scale)
        for name, tensor in given.items():
            captured.batch[name].copy_(tensor)
        captured.graph.replay()
        return LossOutput(*(value.clone() for value in captured.output[:5]), {})  # the next micro-batch overwrites them

    def close(self) -> None:
        """Give back the graphs' memory, the gradients' with it."""
        for parameter in self._gradients:
            parameter.grad = None
        self._captured.clear()
        self._gradients.clear()
        self._pool = None

    def _eager(self, batch: Mapping[str, Tensor], first: bool, scale: float) -> LossOutput:
        if first:
            self._clear_gradients()
        return self._forward_and_backward(batch, scale).detach()

    def _clear_gradients(self) -> None:
        """Zeros where a graph owns the gradients, within a capture as part of it; nothing where none does, and the backward makes them."""
        if self._gradients:
            torch._foreach_zero_(list(self._gradients.values()))
            return
        for parameter in self.network.parameters():
            parameter.grad = None

    def _forward_and_backward(self, batch: Mapping[str, Tensor], scale: float) -> LossOutput:
        kind = self.network.embedding.weight.device.type
        number, self.network.lambda_P = self.network.lambda_P, self._lambda_P  # a number would stay in the graph as it is now
        try:
            # Without autocast's cache: a weight's copy of an earlier step must not be what a graph reads for ever.
            with torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False):
                output = self.network.loss(batch)
        finally:
            self.network.lambda_P = number
        with torch.autocast(kind, enabled=False):
            spoiled_unless_finite(output.loss * scale).backward()
        return output

    def _capture(self, batch: Mapping[str, Tensor], first: bool, scale: float) -> _Captured:
        """Record the step; nothing runs yet. A first micro-batch's gradients are made by the graph, later ones are added to those."""
        if first and not self._gradients:  # their memory is free before the graph's is taken
            self._clear_gradients()
        fixed = {name: tensor.clone() for name, tensor in batch.items()}
        torch.clear_autocast_cache()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads go on meanwhile: a loader's pins memory, which a capture in its default mode takes for an error of its own.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                if first:
                    self._clear_gradients()
                output = self._forward_and_backward(fixed, scale)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise RuntimeError(f"the training step cannot be captured as a CUDA graph ({reason}); set model.cuda_graph=false") from error
        self._pool = graph.pool()
        if not self._gradients:
            self._gradients = {p: p.grad for p in self.network.parameters() if p.grad is not None}
        return _Captured(graph, fixed, output.detach())
