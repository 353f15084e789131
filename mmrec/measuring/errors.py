"""How far two ways to compute the same thing are apart."""

import torch
from torch import Tensor

# ‖a − b‖ / ‖b‖ allowed between one projection and six (HEM), in outputs and gradients.
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}
# Of a block with a window, by quantity. Its softmax does not see what all keys share, so that the gradient of their bias is a sum that all
# but cancels: either form in bf16 is some 1.6 % off float64's with heads of 128, whatever the width.
WINDOW_LIMITS = {torch.bfloat16: {"W_k.bias": 3e-2}}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64 on the device of the latter; ‖actual‖ where that is zero. NaN stays NaN."""
    expected = expected.detach().double()
    actual = actual.detach().to(expected.device).double()
    norm = float(expected.norm())
    return float((actual - expected).norm()) / (norm if norm else 1.0)
