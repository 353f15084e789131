"""`exp_product_scan` in vectorised PyTorch: one cumulative sum of logs, one exponential; another sum backwards."""

import torch
from torch import Tensor

from mmrec.ops.common import state_dtype


def exp_product_scan_forward(log_gamma: Tensor, y0: Tensor | None, accum_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See the public function. The logs are summed, never the products: a product of decays underflows and has no gradient."""
    carried = state_dtype(log_gamma, y0)
    dtype = torch.promote_types(carried, accum_dtype)
    products = log_gamma.to(dtype).cumsum(dim=1).exp()
    outputs = products if y0 is None else y0.to(dtype).unsqueeze(1) * products
    return outputs.to(log_gamma.dtype).contiguous(), outputs[:, -1].to(carried, copy=True)


def exp_product_scan_gradients(
    dy: Tensor, dy_last: Tensor | None, y: Tensor, y_last: Tensor, log_gamma: Tensor | None, accum_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Gradients to `log_gamma` and, where `log_gamma` is given, to `y0`, in the dtype of the sums."""
    dtype = torch.promote_types(y_last.dtype, accum_dtype)
    terms = dy.to(dtype) * y.to(dtype)
    if dy_last is not None:
        terms[:, -1] += dy_last.to(dtype) * y_last.to(dtype)
    dlog_gamma = terms.flip(1).cumsum(dim=1).flip(1)
    if log_gamma is None:
        return dlog_gamma, None
    products = log_gamma.to(dtype).cumsum(dim=1).exp()
    dy0 = (dy.to(dtype) * products).sum(dim=1)
    return dlog_gamma, dy0 if dy_last is None else dy0 + dy_last.to(dtype) * products[:, -1]
