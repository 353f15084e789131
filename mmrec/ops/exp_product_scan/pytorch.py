"""`exp_product_scan` in vectorised PyTorch: one cumulative sum of logs, one exponential."""

import torch
from torch import Tensor

from mmrec.ops.common import state_dtype


def exp_product_scan_pytorch(log_gamma: Tensor, y0: Tensor | None, accum_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See the public function. The logs are summed, never the products: a product of decays underflows and has no gradient."""
    carried = state_dtype(log_gamma, y0)
    dtype = torch.promote_types(carried, accum_dtype)
    products = log_gamma.to(dtype).cumsum(dim=1).exp()
    outputs = products if y0 is None else y0.to(dtype).unsqueeze(1) * products
    return outputs.to(log_gamma.dtype), outputs[:, -1].to(carried)
