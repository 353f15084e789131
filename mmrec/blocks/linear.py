"""The large matrix products of a block where weights are fp32 and products bf16: gradients of weights leave the product as fp32."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrec.ops.column_sum import column_sum
from mmrec.ops.registration import refuse_second_order
from mmrec.ops.wide_product import wide_product


def apply_linear(x: Tensor, module: nn.Linear) -> Tensor:
    """`module(x)`, (B, T, K) to (B, T, D). One that is not plain is called as a module."""
    dtype = narrower_dtype(module.weight) if is_plain(module) else None
    if dtype is None:
        result: Tensor = module(x)
        return result
    result = _Linear.apply(x, module.weight, module.bias, None, dtype, False)
    return result


def add_linear(stream: Tensor, x: Tensor, module: nn.Linear, owned: bool = False) -> Tensor:
    """`stream + module(x)`, (B, T, D); the sum formed within the product on a GPU.

    Args:
        stream: (B, T, D).
        x: (B, T, K).
        module: K → D without bias. One that is not plain (quantised, hooked or wrapped by a library) is called as a module.
        owned: `stream` may be overwritten (see `rms_norm.Branch`).
    """
    if not is_plain(module):
        return stream + module(x)
    dtype = narrower_dtype(module.weight)
    if not torch.is_grad_enabled() or (dtype is None and not owned):
        return add_product(stream, x, module.weight, owned)
    result: Tensor = _Linear.apply(x, module.weight, None, stream, dtype or module.weight.dtype, owned)
    return result


def is_plain(module: nn.Linear) -> bool:
    """Whether nothing is lost where its weight is used without calling it: no subclass of a library's, no hooks, no replaced forward."""
    return type(module) is nn.Linear and not is_hooked(module) and "forward" not in vars(module)


def is_hooked(module: nn.Module) -> bool:
    """Whether someone listens to the module's inputs and outputs."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def narrower_dtype(weight: Tensor) -> torch.dtype | None:
    """In what autocast would multiply an fp32 weight; None where nothing is narrowed, or better by autocast itself.

    That is so without gradients: it narrows each weight once for all calls.
    """
    kind = weight.device.type
    narrows = torch.is_grad_enabled() and torch.is_autocast_enabled(kind) and weight.dtype == torch.float32
    return torch.get_autocast_dtype(kind) if narrows else None


def add_product(stream: Tensor, x: Tensor, weight: Tensor, owned: bool = False) -> Tensor:
    """`stream + x weightᵀ`, (B, T, D), for a weight (D, K); on a GPU within the product, which reads the stream as it writes its output.

    An `owned` stream, contiguous, is overwritten, and returned.
    """
    same = stream.dtype == x.dtype == weight.dtype  # autocast would round a wider stream within the product
    if owned and same:
        stream.view(-1, stream.shape[-1]).addmm_(x.flatten(0, 1), weight.t())
        return stream
    if owned:
        return stream.add_(F.linear(x, weight))
    if not stream.is_cuda or not same:
        return stream + F.linear(x, weight)
    return torch.addmm(stream.flatten(0, 1), x.flatten(0, 1), weight.t()).view(stream.shape)


class _Linear(torch.autograd.Function):
    """`x weightᵀ + bias`, or `stream + x weightᵀ`, multiplied in `dtype`; an `owned` stream becomes the sum.

    Under autocast a weight's gradient would be a bf16 product, cast to fp32 afterwards, and that of a bias torch's sum, rounded to bf16.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stream: Tensor | None, dtype: torch.dtype, owned: bool) -> Tensor:
        narrow_x, narrow = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(narrow_x, narrow)
        ctx.x_dtype, ctx.weight_dtype = x.dtype, weight.dtype
        if owned:
            ctx.mark_dirty(stream)
        if stream is not None:
            return add_product(stream, narrow_x, narrow, owned)
        return F.linear(narrow_x, narrow, None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order("a block's linear layer", "build the loss from torch's own")
        x, weight = ctx.saved_tensors
        x_wanted, weight_wanted, bias_wanted, stream_wanted, *_ = ctx.needs_input_grad
        flat = dy.flatten(0, 1).to(weight.dtype)
        dx = torch.mm(flat, weight).view(x.shape).to(ctx.x_dtype) if x_wanted else None
        dweight = wide_product(flat.t(), x.flatten(0, 1), ctx.weight_dtype) if weight_wanted else None
        dbias = column_sum(flat, ctx.weight_dtype) if bias_wanted else None
        return dx, dweight, dbias, dy if stream_wanted else None, None, None
