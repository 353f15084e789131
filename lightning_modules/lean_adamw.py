"""torchao's AdamW of low memory with our kernel for its step; imported only where a run asks for it, as torchao is slow to import.

torchao compiles a function for every shape, which of 8-bit moments looks each value up in the map of 256 some twenty times: at 6.6 B
parameters its step takes as long as a third of the network's forward and backward. And it cannot leave a step out unless the host waits for
the gradients' norm. The states are torchao's own, so that checkpoints are the same.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torchao.optim import AdamW8bit, _AdamW
from torchao.optim.adam import single_param_adam

from callbacks.shards import local_part
from mmrec.measuring.late_values import LateValues
from mmrec.ops.adamw_8bit import BLOCK, Moment, adamw_8bit_, step_numbers, step_seed
from mmrec.ops.common import state_dtype
from mmrec.ops.registration import runs_kernel


class _FusedStep(Optimizer):
    """The step of both: one kernel a tensor where Triton runs; torchao's own step elsewhere. In shards, each rank steps what it has.

    Attributes:
        grad_scale: 0-dim fp32 that kernels divide gradients by, as torch's fused optimisers do, but without changing `.grad`; None:
            by nothing. Only where `divides_gradients()`.
        found_inf: 0-dim fp32; a step that finds 1 there changes neither weights nor states, as torch's fused optimisers do. The host
            learns of it a step later, when it takes back the step that it had counted: by then the device is far beyond.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    block_size: float
    bf16_stochastic_round: bool
    _new_buffer: Callable[[Tensor, bool], Tensor]
    _counted: tuple[LateValues, list[Tensor]] | None = None  # what the latest step found, and the counts that it raised

    def divides_gradients(self) -> bool:
        """Whether `step` runs as kernels, which take `grad_scale` and `found_inf`."""
        tensors = [local_part(p) for group in self.param_groups for p in group["params"]]
        plain = self.block_size in (BLOCK, math.inf) and not any(group["amsgrad"] for group in self.param_groups)
        return plain and all(runs_kernel(t, state_dtype(t)) and t.is_contiguous() for t in tensors)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over all parameters that have a gradient; nothing waits for what this step has on the device."""
        kernels = self.divides_gradients()
        if not kernels and not any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._settle()
        scalars: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}
        counts: list[Tensor] = []
        salt = 0
        for index, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                salt += 1
                state = self._state_of(parameter)
                state["step"] += 1
                counts.append(state["step"])
                weight, gradient = local_part(parameter), local_part(parameter.grad)
                if not weight.numel():  # more ranks than rows
                    continue
                if not kernels:
                    self._step_of_shard(group, weight, gradient, state)
                    continue
                where = weight.device
                key = (index, int(state["step"].item()), where)
                if key not in scalars:
                    numbers = step_numbers(float(group["lr"]), group["betas"], group["eps"], group["weight_decay"], *key[1:])
                    scalars[key] = numbers, step_seed(*key[1:])
                adamw_8bit_(
                    weight,
                    gradient,
                    _moment(state["exp_avg"]),
                    _moment(state["exp_avg_sq"]),
                    *scalars[key],
                    salt=salt,
                    stochastic=self.bf16_stochastic_round,
                    gradient_scale=self.grad_scale,
                    found_inf=self.found_inf,
                )
        if self.found_inf is not None:
            self._counted = LateValues(self.found_inf), counts
        return loss

    def _step_of_shard(self, group: dict[str, Any], weight: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
        """torchao's own step of what this rank holds; of shards as such torch 2.13 cannot compile it, with moments of 8 bits."""
        stochastic = self.bf16_stochastic_round and weight.dtype is torch.bfloat16
        moments = local_part(state["exp_avg"]), local_part(state["exp_avg_sq"])
        numbers = group["lr"], *group["betas"], group["weight_decay"], group["eps"]
        single_param_adam(weight, gradient, state["step"], *moments, None, *numbers, True, stochastic)

    def _settle(self) -> None:
        """Take the latest step's count back where it was skipped."""
        found, self._counted = self._counted, None
        if found is not None and found[0].read():
            for count in found[1]:
                count -= 1

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state; waits for the latest step."""
        self._settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state; what the latest step found is not about it."""
        self._counted = None
        super().load_state_dict(state_dict)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """As torchao's own step begins it."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = self._new_buffer(parameter, True)
            state["exp_avg_sq"] = self._new_buffer(parameter, False)
        return state


class FusedAdamW8bit(_FusedStep, AdamW8bit):
    """`torchao.optim.AdamW8bit`: moments of 8 bits, but for small tensors."""


class FusedAdamW(_FusedStep, _AdamW):
    """torchao's `_AdamW`: moments of the weights' dtype, bf16 weights rounded stochastically."""


def _moment(state: Tensor) -> Moment:
    local = local_part(state)
    return Moment(local.codes, local.scale) if hasattr(local, "codes") else Moment(local, None)
