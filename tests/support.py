"""What the tests share: one table of tolerances, how far two tensors are apart, which operators were called."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Relative Frobenius error ‖a − b‖ / ‖b‖ allowed between two ways to compute the same thing in a dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; the absolute error where the expected is zero. NaN stays NaN."""
    actual, expected = actual.detach().double(), expected.detach().double()
    norm = expected.norm().item()
    return (actual - expected).norm().item() / (norm if norm else 1.0)


def assert_same(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None, what: str = "", limit: float | None = None) -> None:
    """Both tensors agree to `limit`, or the table's tolerance for `dtype` (default: the actual one's); NaN never passes."""
    assert actual.shape == expected.shape, f"{what}: shapes {tuple(actual.shape)} and {tuple(expected.shape)}"
    error = relative_error(actual, expected)
    limit = TOLERANCE[dtype if dtype is not None else actual.dtype] if limit is None else limit
    assert error <= limit, f"{what}: relative error {error:.2e} > {limit:.0e}"


def same_tensors(one: Mapping[Any, Tensor], other: Mapping[Any, Tensor]) -> bool:
    """Whether both have the same names, and under each the same tensor to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)


class RecordedOperators(TorchDispatchMode):
    """Keeps every call of a `mmrec::` operator below it, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mmrec":
            self.calls.append((func._opname, args))
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> list[str]:
        """In the order of the calls."""
        return [name for name, _ in self.calls]
