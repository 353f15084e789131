"""Every kernel compiles for the GPUs it is meant for, without one: Triton's interpreter lets pass what its compiler refuses."""

from typing import Any

import pytest
import torch
from cases import EXP, GATED, GATED_LOGITS, LINEAR, MEMORY, ONE_GATE, Case, definition, launchers
from kernel_tools import SHARED_MEMORY, compiled_for

from mmrec.ops import sums
from mmrec.ops.decay_log import kernels as decay_kernels
from mmrec.ops.launching import Call
from mmrec.ops.memory_scan import chaining
from mmrec.ops.tuning import overridden

Launched = tuple[Any, tuple[torch.Tensor | None, ...], Call]


def launches(case: Case, dtype: torch.dtype, sizes: dict[str, int], full: bool, monkeypatch: pytest.MonkeyPatch) -> list[Launched]:
    """What forward and backward would launch, on memory nobody touches; `full`: with a state, document starts, the last state used."""
    found: list[Launched] = []
    monkeypatch.setattr(definition(case.name), "runs_kernel", lambda *_: True)
    for module in (launchers("gated_scan" if case in (GATED_LOGITS, ONE_GATE) else case.name), chaining, decay_kernels):
        monkeypatch.setattr(module, "launch", lambda kernel, tensors, prepare, *constants: found.append((kernel, tensors, prepare())))
    monkeypatch.setattr(sums, "launch", lambda *_: None)
    inputs = {}
    for name, letters in case.shapes.items():
        wide = name.startswith("log_") or "T" not in letters
        if full or name != case.state:
            shape = [sizes[letter] for letter in letters]
            inputs[name] = torch.empty(shape, dtype=torch.float32 if wide else dtype, requires_grad=True)
    options = {"reset": torch.zeros(sizes["B"], sizes["T"], dtype=torch.bool)} if full and case.has_reset else {}
    outputs = case.op(**inputs, **options)
    outputs = outputs if full else outputs[:1]
    torch.autograd.grad(outputs, list(inputs.values()), [torch.empty_like(output) for output in outputs], allow_unused=True)
    return found


RECURRENCES = (EXP, LINEAR, GATED, GATED_LOGITS)
KINDS = [
    *((case, torch.bfloat16, {"D": 4096, "P": 4096}) for case in RECURRENCES),
    *((case, torch.float32, {"D": 40, "P": 10}) for case in RECURRENCES),
    (LINEAR, torch.bfloat16, {"D": 2048, "P": 2048}),  # the class between few and many channels
    (GATED_LOGITS, torch.bfloat16, {"D": 1024, "P": 1024}),
    *((ONE_GATE, torch.bfloat16, {"D": width, "P": width}) for width in (1024, 4096)),
    *((MEMORY, torch.bfloat16, {"H": 32, "K": width, "V": width}) for width in (64, 128, 256, 512)),
    *((MEMORY, torch.bfloat16, {"H": heads, "K": width, "V": width}) for heads, width in ((8, 128), (1, 512))),  # few heads
    (MEMORY, torch.float32, {"H": 2, "K": 20, "V": 20}),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("architecture", "full"), [(90, True), (90, False), (80, True)], ids=["hopper-full", "hopper-bare", "ampere"])
@pytest.mark.parametrize(("case", "dtype", "widths"), KINDS, ids=lambda value: getattr(value, "name", None))
def test_kernels_compile_and_fit(
    case: Case, dtype: torch.dtype, widths: dict[str, int], architecture: int, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Ampere, whose shared memory is smaller, with fewer stages if need be, as `launch` does."""
    found = [launched for time in (1, 8192) for launched in launches(case, dtype, {"B": 4, "T": time} | widths, full, monkeypatch)]
    assert len(found) >= 3
    assert_compiled(found, architecture)


def assert_compiled(found: list[Launched], architecture: int) -> None:
    """All that differ compile, and fit the architecture's shared memory."""
    seen = set()
    for kernel, tensors, call in found:
        key = (kernel.__name__, tuple(t if t is None else t.dtype for t in tensors), str(sorted(call.named.items())))
        if key in seen:
            continue
        seen.add(key)
        shared = compiled_for(architecture, kernel, (*tensors, *call.numbers), call.named).metadata.shared
        if architecture < 90 and shared > SHARED_MEMORY[architecture]:
            shared = compiled_for(architecture, kernel, (*tensors, *call.numbers), call.named | {"STAGES": 1}).metadata.shared
        assert shared <= SHARED_MEMORY[architecture], kernel.__name__


@pytest.mark.timeout(600)
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("case", [GATED, GATED_LOGITS], ids=lambda case: case.name)
def test_kernels_of_a_scan_in_segments_compile(case: Case, full: bool, architecture: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with overridden(**{"gated_scan.forward_segments": {"channels": 16384}}):
        found = launches(case, torch.bfloat16, {"B": 1, "T": 32768, "D": 1024, "P": 1024}, full, monkeypatch)
    names = [kernel.__name__ for kernel, *_ in found]
    assert names[:7] == [*["sequential_kernel", "chain_kernel"] * 3, "sequential_kernel"]
    assert names[7:10] == ["adjoint_map_kernel", "chain_kernel", "backward_kernel"]
    assert_compiled(found, architecture)
