"""What was called: the operators of ours that torch dispatched, with their arguments, and the kernels that ran."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from cases import Case, Setting, launchers
from support import RecordedOperators
from torch import Tensor


def recorded_launches(monkeypatch: pytest.MonkeyPatch, operators: Iterable[str]) -> list[str]:
    """A list that gets `<op>` where the kernels of an operator run and `<op>_bwd` where those of its backward do."""
    launched: list[str] = []
    for called in operators:
        module = launchers(called)
        for name, entry in (("launch_forward", called), ("launch_backward", f"{called}_bwd")):
            original = getattr(module, name)

            def noted(*args: Any, _entry: str = entry, _original: Any = original, **options: Any) -> Any:
                launched.append(_entry)
                return _original(*args, **options)

            monkeypatch.setattr(module, name, noted)
    return launched


def operator(name: str) -> Any:
    """`mmrec::<name>`, to be called."""
    return getattr(torch.ops.mmrec, name).default


def recorded_arguments(case: Case, setting: Setting, time: int, with_state: bool = True) -> dict[str, tuple[Any, ...]]:
    """Arguments of `<op>`, `<op>_bwd` and `<op>_bwd_out`, as a forward and a backward pass hand them over; the outputs are NaN."""
    inputs = case.draw(setting, time)
    if not with_state:
        inputs.pop(case.state)
    reset = case.reset(setting, time)
    options = {} if reset is None else {"reset": reset}
    with RecordedOperators() as recorded:
        outputs = case.op(**{name: tensor.requires_grad_() for name, tensor in inputs.items()}, **options)
        torch.autograd.backward(outputs, [torch.randn_like(output) for output in outputs])
    arguments = {name: tuple(detached(argument) for argument in args) for name, args in recorded.calls}
    gradients = operator(f"{case.name}_bwd")(*arguments[f"{case.name}_bwd"])
    poison = tuple(torch.full_like(gradient, float("nan")) for gradient in gradients)
    arguments[f"{case.name}_bwd_out"] = (*arguments[f"{case.name}_bwd"], *poison)
    return arguments


def detached(argument: Any) -> Any:
    """A tensor without its history; anything else as it is."""
    return argument.detach() if isinstance(argument, Tensor) else argument
