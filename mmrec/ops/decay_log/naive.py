"""The truth of `decay_log`, differentiated by autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor


def decay_log_naive(logits: Tensor, bias: Tensor, context: Tensor | None, context_bias: Tensor | None, low: float, high: float) -> Tensor:
    """See the public function."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_gamma = F.logsigmoid(logits.to(wide) + bias)
    if context is not None and context_bias is not None:
        log_gamma = log_gamma + F.logsigmoid(context.to(wide) + context_bias)
    return log_gamma.clamp(low, high)
