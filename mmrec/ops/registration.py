"""How an operator becomes one node of a graph: its schema, its implementation, its fake and, where it has one, its backward."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Read once, as Triton reads it: kernels then run on CPU tensors through Triton's interpreter, which is how CI tests them.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

# `custom_op` costs five times as much a call (30 µs), as long as a kernel of one token runs.
_LIBRARY = torch.library.Library("mmrec", "DEF")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register `mmrec::<name>` for all devices.

    Args:
        schema: the name and signature in torch's schema language; arguments that are written to carry an alias mark, `Tensor(a!)`.
        implementation: what runs; it chooses kernel or PyTorch form by `runs_kernel`.
        fake: the same signature on tensors without data: shapes, dtypes and strides of the outputs.

    Returns:
        The operator, to be called like a function.
    """
    name = schema.partition("(")[0]
    # A compiler must hand tensors over with the strides it traced: what a fake returns may depend on them.
    _LIBRARY.define(schema, tags=(torch.Tag.needs_exact_strides,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mmrec::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.mmrec, name).default


def register_backward(operator: Any, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give a functional operator its autograd formula, of first order: with `create_graph=True` it raises RuntimeError."""

    name = operator.name().partition("::")[2].partition(".")[0]

    def first_order(ctx: Any, *gradients: Tensor | None) -> Any:
        refuse_second_order(name, f"use {name}_naive")
        return backward(ctx, *gradients)

    torch.library.register_autograd(operator, first_order, setup_context=setup_context, lib=_LIBRARY)


def refuse_second_order(name: str, remedy: str) -> None:
    """To be called by a backward that cannot be differentiated: without it a second derivative would silently lack a part."""
    if torch.is_grad_enabled():  # the engine's way of saying create_graph
        raise RuntimeError(f"{name} has no second derivative: call backward without create_graph=True, or {remedy}")


def runs_kernel(reference: Tensor, dtype: torch.dtype) -> bool:
    """Whether an operator with states of `dtype` runs as a Triton kernel: on CUDA, and on the CPU where Triton interprets.

    float64 is the precision of the tests' ground truth and of gradcheck: it always runs the PyTorch form.
    """
    return dtype == torch.float32 and (reference.is_cuda or INTERPRETED)
