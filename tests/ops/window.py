"""A window's attention: random inputs, and the operator and its truth with the parts of their states as inputs and outputs of their own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import GATES, INTERPRETED, Setting
from recorded import operator
from support import TOLERANCE, RecordedOperators
from torch import Tensor

from mmrec.ops.window_attention import WindowState, window_attention

SEQUENCE = ["q", "k", "v", "log_alpha"]
STATE = ["state_k", "state_v", "state_log_alpha"]
ONE_HEAD = INTERPRETED.resized(B=1, H=1)
given = pytest.mark.parametrize("everything", [True, False], ids=["all given", "little given"])


@dataclass(frozen=True)
class Drawn:
    """Inputs, the differentiable ones in a dictionary; `seen` and `reset` are None where there is no state and no document starts."""

    window: int
    inputs: dict[str, Tensor]
    seen: Tensor | None
    reset: Tensor | None

    def of(self, function: Callable[..., tuple[Tensor, WindowState]]) -> Callable[..., tuple[Tensor, ...]]:
        """The operator, or its truth, as a function of `inputs` by name that returns `r` and the state's k, v and log α."""

        def run(reset: Tensor | None = None, **inputs: Tensor) -> tuple[Tensor, ...]:
            parts = [inputs.pop(name) for name in STATE if name in inputs]
            state = WindowState(*parts, self.seen) if parts else None
            r, (k, v, log_alpha, _) = function(**inputs, window=self.window, state=state, reset=reset)
            return r, k, v, log_alpha

        return run

    def arguments(self) -> tuple[Any, ...]:
        """Of the public function, in its order."""
        return (*(self.inputs[name] for name in (*SEQUENCE, "temperature")), self.window, self.state(), self.reset)

    def state(self) -> WindowState | None:
        """The initial one."""
        return None if self.seen is None else WindowState(*(self.inputs[name] for name in STATE), self.seen)


def draw(setting: Setting, time: int, window: int, everything: bool = True, gates: str = "ordinary") -> Drawn:
    """Fresh random ones; `everything`: with a state, of which other sequences saw less, and document starts."""
    sizes, (low, high) = setting.sizes, GATES[gates]
    batch, heads, past = sizes["B"], sizes["H"], window - 1

    def narrow(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=setting.wide).to(setting.device, setting.dtype)

    def logs(tokens: int) -> Tensor:
        return (low + (high - low) * torch.rand(batch, tokens, heads, dtype=setting.wide)).to(setting.device)

    inputs = {name: narrow(batch, time, heads, sizes[width]) for name, width in zip("qkv", "KKV", strict=True)}
    inputs["log_alpha"] = logs(time).to(setting.gate_dtype or setting.wide)
    # Scores of order 1, as a network's are.
    inputs["temperature"] = ((0.5 + torch.rand(heads, dtype=setting.wide)) / sizes["K"] ** 0.5).to(setting.device)
    if not everything:
        return Drawn(window, inputs, None, None)
    inputs |= dict(
        zip(STATE, (*(narrow(batch, past, heads, sizes[width]) for width in "KV"), logs(past)), strict=True),
    )
    unseen = torch.tensor([past // 3, 0])[torch.arange(batch) % 2]
    seen = torch.arange(past) >= unseen[:, None]
    return Drawn(window, inputs, seen.to(setting.device), (torch.rand(batch, time) < min(0.2, 8 / time)).to(setting.device))


def gradient_limit(setting: Setting, name: str, gates: str = "ordinary") -> float:
    """Tolerance of a gradient."""
    limit = TOLERANCE[setting.coarsest]
    if name in ("v", "state_v"):
        return limit
    if gates == "near 0":
        # Nearly all weight lies on a token itself: the truth's softmax is left with differences of 1e-4 of terms of order 1, and the
        # weights of the others are powers of e with exponents in the hundreds where tiles are long.
        limit = max(limit, 1e-9 if setting.dtype == torch.float64 else 1e-4)
    if name.endswith("log_alpha") and setting.dtype == torch.float32:
        limit = max(limit, 1e-4)  # the sum of what fp32 rounded of every token before
    if name == "temperature":
        limit *= 5  # of a sum over all pairs, of both signs, whose terms keep the table's tolerance
    if setting.dtype == torch.bfloat16 and setting.device == "cpu":
        limit *= 2  # the interpreter cuts bf16 off where a GPU rounds
    return limit


def recorded_arguments(drawn: Drawn) -> dict[str, tuple[Any, ...]]:
    """Arguments of the operator, its backward and the backward into buffers, which are NaN."""
    with RecordedOperators() as recorded:
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in drawn.inputs.items()}
        r = drawn.of(window_attention)(drawn.reset, **leaves)[0]
        torch.autograd.backward(r, torch.randn_like(r))
    arguments = {name: tuple(a.detach() if isinstance(a, Tensor) else a for a in args) for name, args in recorded.calls}
    written = operator("window_attention_bwd")(*arguments["window_attention_bwd"])
    arguments["window_attention_bwd_out"] = (
        *arguments["window_attention_bwd"],
        *(torch.full_like(gradient, float("nan")) for gradient in written),
    )
    return {name: args for name, args in arguments.items() if name.startswith("window_attention")}
