"""The operators' benchmark on the CPU: its rows, its floor against hand arithmetic, and that a wrong operator is named."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from mmrec.measuring import clocks

FOLDER = Path(__file__).parents[1] / "benchmarks"
MODULES = (
    "operators",
    "operator_cases",
    "operator_parity",
    "operator_peers",
    "tune_operators",
    "tuning_shapes",
)
KEYS = {
    "op", "B", "T", "D", "H", "dtype", "direction", "ms", "floor_ms", "bytes", "copy_tbps", "gate_dtype", "max_rel_err", "peers",
    "torch", "triton", "gpu", "date",
}  # fmt: skip


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The benchmark's modules, which import each other as scripts of one folder do; gone from the interpreter afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    loaded: dict[str, ModuleType] = {name: __import__(name) for name in MODULES}
    yield SimpleNamespace(**loaded)
    for name in [name for name, module in sys.modules.items() if str(FOLDER) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


@pytest.fixture
def brief(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The same, with one repetition a time and a small parity check."""
    monkeypatch.setattr(clocks, "CPU_REPEATS", 1)
    every = scripts.operator_parity.cases
    monkeypatch.setattr(scripts.operator_parity, "cases", lambda names, quick, seed: every(names, True, seed)[::3])
    return scripts


def rows_of(script: ModuleType, folder: Path, *arguments: str) -> tuple[int, list[dict[str, object]]]:
    output = folder / "ops.json"
    code = script.main(["--quick", "--output", str(output), *arguments])
    return code, json.loads(output.read_text())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's form of the benchmark")
def test_a_quick_run_writes_complete_rows(brief: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = rows_of(brief.operators, tmp_path, "--peers", "fast")
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert {(row["op"], row["direction"]) for row in rows} == {
        (name, way) for name in brief.operator_cases.OPERATORS for way in ("fwd", "fwdbwd")
    }
    for row in rows:
        assert row.keys() >= KEYS
        assert row["ms"] > 0
        assert row["floor_ms"] > 0
        assert 0 < row["max_rel_err"] < 1e-2
        assert row["parity"] == "ok"
        assert (row["H"] is None) == (row["op"] not in ("memory_scan", "window_attention"))
        assert row["dtype"] == ("float32" if row["op"] == "exp_product_scan" else "bfloat16")
    peers = {row["op"]: row["peers"].keys() for row in rows}
    assert peers == {
        "linear_scan": {"torch_cumsum", "accelerated_scan"},
        "gated_scan": set(),
        "exp_product_scan": {"torch_cumsum"},
        "memory_scan": {"sdpa_flash"},
        "window_attention": {"sdpa_flash"},
        "short_convolution": {"torch_conv1d"},
    }
    assert all(row["peers"]["torch_conv1d"] > 0 for row in rows if row["op"] == "short_convolution")
    for row in rows:  # no figure without a reason
        for name, ms in row["peers"].items():
            assert ms is not None or f"no figure of {name}" in printed


@pytest.mark.parametrize("part", ["output", "last state", "a gradient", "unwritten memory"])
def test_a_wrong_operator_is_named_and_fails(
    brief: SimpleNamespace, part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = brief.operator_cases.OPERATORS["linear_scan"]

    def wrong(x, log_a, h0=None, reset=None):
        if part == "a gradient":
            log_a = log_a.detach() + 0.5 * (log_a - log_a.detach())
        h, last = right.op(x, log_a, h0, reset)
        if part == "output":
            return h * 1.1, last
        if part == "unwritten memory":
            return torch.cat([h[:, :-1], h[:, -1:] * 0 + torch.empty_like(h[:, -1:])], dim=1), last
        return (h, last * 1.1) if part == "last state" else (h, last)

    monkeypatch.setitem(brief.operator_cases.OPERATORS, "linear_scan", dataclasses.replace(right, op=wrong))
    code, rows = rows_of(brief.operators, tmp_path, "--only", "linear_scan,exp_product_scan", "--peers", "none")
    assert code == 1
    tensor = {"last state": "last h", "a gradient": "dlog_a"}.get(part, "output")
    assert f"PARITY MISS: {tensor}: " in capsys.readouterr().out
    assert {row["op"]: row["parity"] for row in rows} == {"linear_scan": "missed", "exp_product_scan": "ok"}  # the others go on


def test_an_operator_that_raises_is_named_and_costs_no_other_one(
    brief: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(*arguments, **options):
        raise RuntimeError("out of registers")

    broken = dataclasses.replace(brief.operator_cases.OPERATORS["linear_scan"], op=refuses)
    monkeypatch.setitem(brief.operator_cases.OPERATORS, "linear_scan", broken)
    code, rows = rows_of(brief.operators, tmp_path, "--only", "linear_scan,exp_product_scan", "--peers", "none")
    assert code == 1
    assert "NOT MEASURED: linear_scan B2 T40 D32: RuntimeError: out of registers" in capsys.readouterr().out
    assert {row["op"] for row in rows} == {"exp_product_scan"}


def test_bytes_are_what_one_counts_by_hand(scripts: SimpleNamespace) -> None:
    cases, cpu = scripts.operator_cases, torch.device("cpu")
    bf16, fp32 = torch.bfloat16, torch.float32

    def bytes_of(name: str, shape, direction: str, dtype=bf16, gate_dtype=fp32) -> int:
        operator = cases.OPERATORS[name]
        inputs = cases.draw(operator, shape, dtype, gate_dtype, cpu)
        return cases.moved_bytes(operator, inputs, operator.op(**inputs), direction)

    B, T, D = 2, 8, 32
    elements, last = B * T * D, 4 * B * D  # the last state is fp32
    shape, gated = cases.Shape(B, T, D), cases.Shape(B, T, D, P=D)
    assert bytes_of("linear_scan", shape, "fwd") == 8 * elements + last
    assert bytes_of("linear_scan", shape, "fwdbwd") == 22 * elements + last
    assert bytes_of("linear_scan", shape, "fwdbwd", gate_dtype=bf16) == 16 * elements + last
    w_g = 4 * D  # read twice, its gradient written
    assert bytes_of("gated_scan", gated, "fwd") == 10 * elements + w_g + last
    assert bytes_of("gated_scan", gated, "fwdbwd") == 30 * elements + 3 * w_g + last
    assert bytes_of("gated_scan", dataclasses.replace(gated, P=D // 8), "fwd") == 8 * elements + elements // 4 + w_g + last
    assert bytes_of("exp_product_scan", shape, "fwd", fp32) == 8 * elements + last
    assert bytes_of("exp_product_scan", shape, "fwdbwd", fp32) == 20 * elements + last
    heads = cases.Shape(B, T, D, H=4)
    gates, memory = 4 * B * T * 4, 4 * B * 4 * 8 * 8
    assert bytes_of("memory_scan", heads, "fwd") == 4 * 2 * elements + gates + memory
    assert bytes_of("memory_scan", heads, "fwdbwd") == (4 + 1 + 3 + 3) * 2 * elements + 3 * gates + memory
    window = dataclasses.replace(heads, W=6)  # its last state is a view of the inputs, its window a number
    temperature, number = 4 * 4, 8
    assert bytes_of("window_attention", window, "fwd") == 4 * 2 * elements + gates + temperature + number
    assert bytes_of("window_attention", window, "fwdbwd") == (4 + 1 + 4 + 3) * 2 * elements + 3 * gates + 3 * temperature + number
    taps = dataclasses.replace(shape, J=4)  # its last state is a view of the input; gains are read twice, their gradient written
    assert bytes_of("short_convolution", taps, "fwd") == 4 * elements + 4 * 4 * D
    assert bytes_of("short_convolution", taps, "fwdbwd") == 10 * elements + 3 * 4 * 4 * D
    # At the shape of the goal: 0.0895 ms at 3 TB/s.
    assert pytest.approx(0.0895, abs=5e-5) == 8 * 4 * 2048 * 4096 / 3.0e9


def test_flops_are_what_one_counts_by_hand(scripts: SimpleNamespace) -> None:
    cases = scripts.operator_cases
    shape = cases.Shape(4, 2048, 4096, H=32)
    # A token and head: 65 · 128 for q·k and as much for the values, 2 · 128² for q·M and as much for k vᵀ.
    forward = 4 * 2048 * 32 * (2 * 65 * 128 + 2 * 2 * 128**2)
    assert cases.flops(cases.OPERATORS["memory_scan"], shape, "fwd") == forward
    assert cases.flops(cases.OPERATORS["memory_scan"], shape, "fwdbwd") == forward * 7 // 2
    assert cases.flops(cases.OPERATORS["linear_scan"], shape, "fwd") == 0
    # q·k and the product with v, 2 · 128 each a pair; the first 512 tokens see 1 … 512 of them.
    window, pairs = dataclasses.replace(shape, W=512), 512 * 513 // 2 + (2048 - 512) * 512
    assert cases.flops(cases.OPERATORS["window_attention"], window, "fwd") == 4 * 32 * pairs * 2 * 2 * 128
    whole = dataclasses.replace(shape, W=4096)
    assert cases.flops(cases.OPERATORS["window_attention"], whole, "fwdbwd") == 4 * 32 * (2048 * 2049 // 2) * 7 * 2 * 128


def test_torchs_convolution_is_the_same_function(scripts: SimpleNamespace) -> None:
    cases, cpu = scripts.operator_cases, torch.device("cpu")
    timing = cases.Timing("short_convolution", cases.Shape(2, 40, 32, J=4), torch.float32)
    inputs = cases.draw(cases.OPERATORS["short_convolution"], timing.shape, torch.float32, torch.float32, cpu)
    function, tensors = scripts.operator_peers.PEERS["torch_conv1d"][2](inputs, timing)
    expected = cases.OPERATORS["short_convolution"].naive(**inputs)[0]
    torch.testing.assert_close(function(*tensors).transpose(1, 2), expected)


@pytest.mark.parametrize("part", ["gains", "last state"])
def test_a_wrong_convolution_is_named(scripts: SimpleNamespace, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parity, right = scripts.operator_parity, scripts.operator_cases.OPERATORS["short_convolution"]
    found = parity.all_findings(["short_convolution"], True, 0)
    assert not [finding for finding in found if finding.missed]
    assert {"output", "last state", "dx", "dweight", "dstate"} <= {finding.tensor for finding in found}

    def wrong(x, weight, state=None, reset=None):
        y, after = right.op(x, weight if part != "gains" else weight.flip(1), state, reset)
        return y, after if part != "last state" else after.flip(1)

    monkeypatch.setitem(scripts.operator_cases.OPERATORS, "short_convolution", dataclasses.replace(right, op=wrong))
    missed = {finding.tensor for finding in parity.all_findings(["short_convolution"], True, 0) if finding.missed}
    assert missed >= ({"output", "dx", "dweight"} if part == "gains" else {"last state"})


def test_the_worst_value_counts_where_sums_are_in_float64(scripts: SimpleNamespace) -> None:
    parity = scripts.operator_parity
    expected = torch.tensor([1.0, 1e-20, 1e-40], dtype=torch.float64)
    assert parity.pointwise(expected * torch.tensor([1.0, 1 + 5e-7, 0.0], dtype=torch.float64), expected) == pytest.approx(5e-7, rel=1e-3)
    assert parity.pointwise(expected + torch.tensor([0, 0, 2e-30]).double(), expected) == pytest.approx(2e-6)
    assert not parity.pointwise(expected * float("nan"), expected) <= 1e-6


def test_forced_options_replace_rows_of_their_kind_and_readings_are_noted(scripts: SimpleNamespace) -> None:
    from mmrec.ops.tuning import launch_options

    kernels = {"a.scan": {"choice": {"min_time": 4}, "few": {"BD": 8, "num_warps": 1}, "many": {"BD": 16, "num_warps": 1}}}
    cpu, tile, plan = torch.device("cpu"), {"BD": 32, "num_warps": 2}, {"min_time": 9}
    with scripts.tuning_shapes.using(kernels, (("a.scan", tile),)) as used:
        assert launch_options("a.scan", "few", cpu) == launch_options("a.scan", "many", cpu) == tile
        assert launch_options("a.scan", "choice", cpu) == {"min_time": 4}
        assert used == {("a.scan", "few"), ("a.scan", "many"), ("a.scan", "choice")}
    with scripts.tuning_shapes.using(kernels, (("a.scan", plan), ("a.scan", tile))) as used:
        assert launch_options("a.scan", "choice", cpu) == plan
        assert launch_options("a.scan", "few", cpu) == tile


def test_candidates_are_of_rows_that_the_table_has(scripts: SimpleNamespace) -> None:
    from mmrec.ops.tuning import read_table

    kernels = read_table("sm90")["kernels"]
    for kernel, rows in json.loads(scripts.tune_operators.CANDIDATES.read_text()).items():
        for row, candidates in rows.items():
            # What a launcher reads itself; Triton's own options may be left out.
            needed = kernels[kernel][row].keys() - {"num_stages", "maxnreg"}
            assert all(needed <= options.keys() for options in candidates), (kernel, row)


def test_a_gpu_is_needed_for_more(scripts: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripts.operators, "device", lambda: torch.device("cpu"))
    with pytest.raises(SystemExit) as end:
        scripts.operators.main([])
    assert end.value.code == 2
    assert "no CUDA device; --quick runs tiny shapes on the CPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        scripts.operators.main(["--quick", "--only", "linear_scam"])
    assert "no operator linear_scam; did you mean linear_scan?" in capsys.readouterr().err
