"""For tests of Triton kernels: the interpreter without its costliest habit, and the compiler without a GPU."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_source
from triton.runtime import interpreter

SHARED_MEMORY = {80: 166_912, 90: 232_448}  # bytes a program may use, by architecture
_TYPES = {
    torch.uint8: "*u8",
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.bool: "*i1",
    torch.int32: "*i32",
}


def patch_language_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of a device function patches Triton's language anew, a third of the run time: once a kernel is enough."""
    patch_language = interpreter._patch_lang
    patched: set[frozenset[str]] = set()

    def once(function):
        seen = {v.__name__ for v in function.__globals__.values() if isinstance(v, ModuleType) and v in (tl, tl.core)}
        if seen in patched:
            return None
        patched.add(frozenset(seen))
        scope = patch_language(function)

        def restore():  # called for the kernel alone
            patched.clear()
            scope.restore()

        return SimpleNamespace(restore=restore)

    monkeypatch.setattr(interpreter, "_patch_lang", once)


def small_where_interpreted(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, small: Callable[[], AbstractContextManager[None]]
) -> Iterator[None]:
    """Of a fixture around every test: those marked `interpreted` run within `small`, and without the interpreter's costliest habit."""
    if request.node.get_closest_marker("interpreted") is None:
        yield
        return
    patch_language_once(monkeypatch)
    with small():
        yield


def compiled_for(architecture: int, kernel: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """The kernel as Triton would compile it for a launch with these arguments: tensors, None and numbers, then constants and options."""
    signature, constants, attributes = {}, {}, {}
    options = {name: value for name, value in named.items() if name not in kernel.arg_names}
    for index, name in enumerate(kernel.arg_names):
        value = positional[index] if index < len(positional) else named[name]
        specialised = name not in kernel.do_not_specialize
        if index >= len(positional) or value is None or (type(value) is int and value == 1 and specialised):
            signature[name], constants[index,] = "constexpr", value
            continue
        signature[name] = _TYPES[value.dtype] if isinstance(value, torch.Tensor) else "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0 and specialised):
            attributes[index,] = [["tt.divisibility", 16]]
    return compile_source(ASTSource(kernel, signature, constants, attributes), target=GPUTarget("cuda", architecture, 32), options=options)
