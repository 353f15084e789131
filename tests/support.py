"""What the tests share: one table of tolerances, and how far two tensors are apart."""

import torch
from torch import Tensor

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
