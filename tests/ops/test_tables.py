"""The tables of tile sizes: whatever a launcher asks for is there, and nothing else."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, GATED_LOGITS, Case, definition, launchers

import mmrec.ops
from mmrec.ops import sums, tuning, window_attention
from mmrec.ops.decay_log import kernels as decay_kernels
from mmrec.ops.memory_address import kernels as address_kernels
from mmrec.ops.memory_scan import addressed, chaining
from mmrec.ops.window_attention import decays as window_decays
from mmrec.ops.window_attention import launchers as window_launchers
from mmrec.ops.window_attention import operator as window_operator

TABLES = sorted((Path(mmrec.ops.__file__).parent / "tables").glob("*.json"))
Asked = set[tuple[str, str]]


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_options_are_plain_numbers(path: Path) -> None:
    table = json.loads(path.read_text(encoding="utf-8"))
    assert table["machine"]
    for kernel, rows in table["kernels"].items():
        for row, options in rows.items():
            assert options, (kernel, row)
            assert all(type(value) in (int, bool) for value in options.values()), (kernel, row)


def look_ups(fused: int, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """A set that gets the rows that are looked up, while launchers run in full and kernels not at all; `fused` wherever that is asked."""
    rows: Asked = set()
    look_up = tuning.launch_options

    def remember(kernel: str, shape_class: str, device: torch.device) -> dict[str, Any]:
        rows.add((kernel, shape_class))
        options = look_up(kernel, shape_class, device)
        return {**options, "fused": fused} if "fused" in options else options

    for module in (addressed, window_operator):
        monkeypatch.setattr(module, "runs_kernel", lambda *_: True)
    monkeypatch.setattr(window_launchers, "launch_options", remember)
    for shared in (sums, chaining, decay_kernels, address_kernels, window_decays, window_launchers):
        monkeypatch.setattr(shared, "launch", lambda kernel, tensors, prepare, *constants: prepare())
    for case in CASES:
        monkeypatch.setattr(definition(case.name), "runs_kernel", lambda *_: True)
        if case is not GATED_LOGITS:  # which launches through gated_scan's module
            monkeypatch.setattr(launchers(case.name), "launch_options", remember)
            monkeypatch.setattr(launchers(case.name), "launch", lambda kernel, tensors, prepare, *constants: prepare())
    return rows


def run(case: Case, dtype: torch.dtype, options: dict[str, Any], **sizes: int) -> None:
    """Forward and backward on memory that nobody touches."""
    inputs = {}
    for name, letters in case.shapes.items():
        wide = name.startswith("log_") or "T" not in letters
        inputs[name] = torch.empty([sizes[letter] for letter in letters], dtype=torch.float32 if wide else dtype, requires_grad=True)
    outputs = case.op(**inputs, **options)
    torch.autograd.grad(outputs, list(inputs.values()), [torch.empty_like(output) for output in outputs])


def run_addressed(dtype: torch.dtype, B: int, T: int, H: int, K: int, V: int) -> None:
    """The backward through a memory's addresses, likewise."""
    q, k, h, dq, dk, dh = (torch.empty(B, T, H, K, dtype=dtype) for _ in range(6))
    v, dr, dv = (torch.empty(B, T, H, V, dtype=dtype) for _ in range(3))
    log_alpha, dlog_alpha, q_scale, k_scale = (torch.empty(B, T, H) for _ in range(4))
    outputs = (dq, dk, dv, dlog_alpha, torch.empty(B, H, K, V), dh)
    addressed.addressed_memory_bwd_out(dr, None, q, k, v, log_alpha, None, None, 1.0, None, q_scale, k_scale, h, *outputs)


def run_window(dtype: torch.dtype, B: int, T: int, H: int, K: int, V: int) -> None:
    """A window's attention, likewise."""
    q, k = (torch.empty(B, T, H, K, dtype=dtype, requires_grad=True) for _ in range(2))
    v, log_alpha, temperature = torch.empty(B, T, H, V, dtype=dtype), torch.empty(B, T, H), torch.empty(H)
    r, _ = window_attention(q, k, v, log_alpha, temperature, 100)
    torch.autograd.grad(r, [q, k], torch.empty_like(r))


def run_all_shape_classes() -> None:
    """Every operator in shapes of all its classes."""
    for case, dtype in itertools.product(CASES, (torch.float32, torch.bfloat16, torch.float16)):
        wide = case.name == "memory_scan"
        widths = (
            [{"H": 2, "K": K, "V": K} for K in (20, 64, 128, 256, 512)] if wide else [{"D": D, "P": D // 4} for D in (20, 768, 1536, 4096)]
        )
        kinds = [{"accum_dtype": kind} for kind in (torch.float32, torch.float64)] if case.name == "exp_product_scan" else [{}]
        for B, T, width, options in itertools.product((1, 4, 64), (1, 7, 300, 5000), widths, kinds):
            if B * T * width.get("D", 1024) <= 64 * 300 * 4096:
                run(case, dtype, options, B=B, T=T, **width)
                if wide:
                    run_addressed(dtype, B=B, T=T, **width)
                    run_window(dtype, B=B, T=T, **width)


def test_a_table_holds_what_launchers_ask_for_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """With either answer where kernels may be fused: which is faster is itself in the table, and tuned."""
    asked: Asked = set()
    for fused in (0, 1):
        with monkeypatch.context() as patch:
            rows = look_ups(fused, patch)
            run_all_shape_classes()
        asked |= rows
    for path in TABLES:
        kernels = json.loads(path.read_text(encoding="utf-8"))["kernels"]
        assert {(kernel, row) for kernel, rows in kernels.items() for row in rows} == asked
