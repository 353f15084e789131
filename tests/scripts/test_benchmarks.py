"""Both benchmark scripts on the CPU: their rows, their verdict on parity, and what they say of sizes that do not fit."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import RecordedOperators, assert_same

from mmrec.blocks.hem import FusedProjections, Projections
from mmrec.blocks.mm_rec_block import MMRecBlock
from mmrec.measuring import clocks
from mmrec.scripts import benchmark_hem, benchmark_options, device_memory, measurements, real_benchmark
from mmrec.scripts.dram_traffic import METRICS, dram_bytes, read_report
from mmrec.scripts.launches import count_launches
from mmrec.scripts.plain_passes import with_plain_passes

pytestmark = pytest.mark.usefixtures("_quick")
TINY = ["--device", "cpu", "--repeat", "1", "--batch", "1", "--seq-len", "16", "--model-dim", "32", "--num-heads", "2"]
TINY += ["--pe-dim", "8", "--ffn-dim", "64", "--vocab-size", "50", "--num-layers", "3"]
KEYS = [
    "what", "B", "T", "D", "H", "hem", "uboo", "direction", "ms", "gemm_only_ms", "launches", "tokens_per_s", "peak_mib", "bytes",
    "reduction_pct", "torch", "triton", "gpu", "date",
]  # fmt: skip
Row = dict[str, Any]
BETWEEN = "block_six_gemms_fused_rest"


@pytest.fixture
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each call timed once; results in the test's folder; one thread; tables as wide as they are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)  # xdist tells its workers 80
    monkeypatch.setattr(clocks, "CPU_REPEATS", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows_of(script: ModuleType, *options: str) -> tuple[int, list[Row]]:
    code = script.main([*TINY, *options, "--output", "rows.json"])
    return code, json.loads(Path("rows.json").read_text())


def one_line_error(script: ModuleType, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    with pytest.raises(SystemExit) as end:
        script.main([*options])
    assert end.value.code == 2
    assert not Path("benchmark_results.json").exists()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("uboo", [False, True])
def test_hem_is_measured_off_and_on(uboo: bool, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = rows_of(benchmark_hem, *(["--uboo"] if uboo else []))
    printed = capsys.readouterr().out
    assert code == 0, printed
    timed = rows[2:]
    for parity, memory in zip(rows[:2], ("matrix", "window"), strict=True):
        assert (parity["what"], parity["memory"]) == ("parity", memory)
        assert parity["parity"] == "ok"
        assert 0 < parity["largest"] <= parity["limit"] == 1e-5
        assert ("L_aux" in parity["errors"]) == uboo
        assert {"output", "dx", "W_e.weight", "W_p.bias", "ffn.W_down.weight"} <= parity["errors"].keys()
        assert ("convolution.q_gain" in parity["errors"]) == (memory == "window")
        assert f"parity of one projection and six, block with a {memory}: " in printed
    assert [(row["what"], row["memory"], row["direction"], row["hem"]) for row in timed] == [
        *(
            (what, memory, direction, hem)
            for direction in ("fwd", "fwdbwd")
            for memory in ("matrix", "window")
            for what, hem in (("block", False), (BETWEEN, False), ("block", True))
        ),
        ("forward_3", None, "fwd", False), ("forward_3", None, "fwd", True),
    ]  # fmt: skip
    between = [row for row in timed if row["what"] == BETWEEN]
    timed = [row for row in timed if row["what"] != BETWEEN]
    for eager, fused in zip(timed[:8:2], between, strict=True):
        assert fused["launches"] == eager["launches"] == 6
        assert fused["reduction_pct"] == pytest.approx(100 * (1 - fused["ms"] / eager["ms"]))
    for row in rows:
        assert list(row)[: len(KEYS)] == KEYS
        assert (row["B"], row["T"], row["D"], row["H"], row["uboo"]) == (1, 16, 32, 2, uboo)
    for off, on in zip(timed[::2], timed[1::2], strict=True):
        layers = 3 if off["what"] == "forward_3" else 1
        assert (off["launches"], on["launches"]) == (6 * layers, layers)
        assert off["reduction_pct"] is None
        assert on["reduction_pct"] == pytest.approx(100 * (1 - on["ms"] / off["ms"]))
        for row in (off, on):
            assert row["ms"] > 0
            assert row["gemm_only_ms"] > 0
            assert row["peak_mib"] > 0
            assert row["tokens_per_s"] == pytest.approx(16 / row["ms"] * 1e3)
            assert row["replayed"] is False
            assert row["bytes_ncu"] is None
            assert row["bytes_ncu_reason"]
    # By hand, fp32, D 32, P 8, 16 tokens: weights, inputs, outputs.
    assert timed[0]["bytes"] == 4 * ((4 * 32 * 32 + 2 * 32 * 8) + 16 * (5 * 32 + 8) + 16 * (5 * 32 + 8))
    assert timed[1]["bytes"] == 4 * (32 * (5 * 32 + 8) + 16 * 32 + 16 * (5 * 32 + 8))
    assert timed[5]["bytes"] == 3 * timed[1]["bytes"]
    for memory in ("matrix", "window"):
        for direction in ("fwd", "fwdbwd"):
            assert f"block with a {memory} {direction}, eager passes" in printed
            assert f"block with a {memory} {direction}, fused passes" in printed
    assert "forward_3 fwd, eager passes" in printed
    assert {row["command"].split()[:3][-1] for row in rows} == {"mmrec.scripts.benchmark_hem"}


def test_the_network_is_measured_layer_by_layer(capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = rows_of(real_benchmark)
    assert code == 0
    named = [(row["what"], row["memory"], row["direction"]) for row in rows]
    blocks = [("block", memory, direction) for direction in ("fwd", "fwdbwd") for memory in ("matrix", "window")]
    layers = [("layer", memory, "fwd") for memory in ("matrix", "matrix", "window")]
    others = [(what, None, "fwd") for what in ("forward_3", "embedding", "norm", "head")]
    assert named == [("parity", "matrix", "fwdbwd"), ("parity", "window", "fwdbwd"), *blocks, *others[:2], *layers, *others[2:]]
    assert all(row["hem"] for row in rows)
    assert all(row["ms"] > 0 and row["tokens_per_s"] > 0 for row in rows[2:])
    assert [row["layer"] for row in rows if row["what"] == "layer"] == [0, 1, 2]
    assert sum(row["share"] for row in rows[7:]) == pytest.approx(1)
    printed = capsys.readouterr().out
    assert "a window of 512 tokens in 1 of 3 layers" in printed
    cells = [[cell.strip() for cell in line.split("│")[1:4]] for line in printed.splitlines() if line.startswith("│")]
    shown = [f"{row['what']} {row['layer']}" if row["what"] == "layer" else row["what"] for row in rows[2:]]
    assert cells == [[what, memory or "–", direction] for what, (_, memory, direction) in zip(shown, named[2:], strict=True)]


@pytest.mark.parametrize("script", [real_benchmark, benchmark_hem])
def test_a_block_said_to_have_a_window_has_one_and_no_other(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def counted(call: Any, *arguments: Any) -> Any:  # once a row, in the rows' order
        with RecordedOperators() as called:
            call()
        ran.append("window" if "window_attention" in called.names else "matrix")
        return count_launches(call, *arguments)

    monkeypatch.setattr(measurements, "count_launches", counted)
    for layers, memories in (("3", {"matrix", "window"}), ("2", {"matrix"})):
        ran.clear()
        _, rows = rows_of(script, "--only", "block", "--num-layers", layers)
        assert [row["memory"] for row in rows if row["what"] != "parity"] == ran
        assert set(ran) == {row["memory"] for row in rows} == memories


def test_rows_of_several_sizes_share_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    _, first = rows_of(benchmark_hem, "--only", "block")
    _, both = rows_of(benchmark_hem, "--only", "block", "--num-heads", "4", "--append")
    assert both[: len(first)] == first
    assert [row["H"] for row in both] == [2] * len(first) + [4] * len(first)
    _, alone = rows_of(benchmark_hem, "--only", "block")
    assert len(alone) == len(first)
    Path("rows.json").write_text("{}")
    with pytest.raises(SystemExit) as end:
        rows_of(benchmark_hem, "--append")
    assert end.value.code == 2
    assert "rows.json holds no list of rows" in capsys.readouterr().err


def test_a_narrow_terminal_loses_no_number(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    _, rows = rows_of(real_benchmark, "--only", "block")
    wide = capsys.readouterr().out
    assert all(len(re.sub("\x1b\\[[0-9;]*m", "", line)) <= 80 for line in wide.splitlines() if "│" in line)
    for row in (row for row in rows if row["what"] != "parity"):
        assert f"{row['ms']:.3f}" in wide
        assert f"{row['fastest_ms']:.3f} … {row['slowest_ms']:.3f}" in wide
        assert f"{row['tokens_per_s']:,.0f}" in wide


def test_a_piped_table_keeps_to_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    rows_of(benchmark_hem, "--only", "block", "--ncu")
    captured = capsys.readouterr()
    assert all(len(line) <= 80 for line in captured.out.splitlines() if "│" in line)
    assert "no bytes by ncu: no CUDA device" in captured.out
    assert " ".join(captured.out.split()).count("Off: six projections,") == 1


def test_the_profilers_own_lines_are_left_out_and_no_others(capfd: pytest.CaptureFixture[str]) -> None:
    module = torch.nn.Linear(4, 4)

    def call() -> None:
        module(torch.ones(1, 4))
        os.write(2, b"USDT: of somebody else\nan error\n")

    assert count_launches(call, [module], torch.device("cpu")).marked == 1
    said = capfd.readouterr().err
    assert "profiler_start" not in said
    assert said.count("USDT: of somebody else\nan error\n") == 2  # warmed up before


def test_one_part_alone_in_bf16(capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = rows_of(real_benchmark, "--only", "forward", "--precision", "bf16")
    assert code == 0
    assert {row["what"] for row in rows} == {"parity", "forward_3", "embedding", "layer", "norm", "head"}
    assert [row["memory"] for row in rows if row["what"] == "parity"] == ["matrix", "window"]
    assert rows[0]["limit"] == 1e-2
    assert "bf16, UBÖO off" in capsys.readouterr().out


@pytest.mark.parametrize("script", [real_benchmark, benchmark_hem])
def test_a_parity_miss_is_named_and_fails_but_is_timed(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = FusedProjections.whole_and_parts

    def wrong(self: FusedProjections, x: torch.Tensor) -> tuple[torch.Tensor, Projections]:
        whole, parts = right(self, x)
        whole = torch.cat([*parts[:5], parts.e * 1.1], dim=-1)
        return whole, Projections(*whole.split(self.widths, dim=-1))

    monkeypatch.setattr(FusedProjections, "whole_and_parts", wrong)
    code, rows = rows_of(script, "--only", "block")
    assert code == 1
    assert [row["parity"] for row in rows[:2]] == ["missed", "missed"]
    misses = [line for line in capsys.readouterr().out.splitlines() if line.startswith("PARITY MISS: output: ")]
    assert [line.rpartition(" ")[2] for line in misses] == ["matrix", "window"]
    assert all(row["ms"] > 0 for row in rows[2:])


def test_the_bias_of_a_windows_keys_has_a_limit_of_its_own_in_bf16(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = {"W_k.bias": 0.02, "output": 0.009}
    monkeypatch.setattr(measurements, "parity_errors", lambda *arguments: errors)
    for precision, missed in (("bf16", [["W_k.bias"], []]), ("fp32", [["W_k.bias", "output"]] * 2)):
        code, rows = rows_of(real_benchmark, "--only", "block", "--precision", precision)
        assert code == 1
        assert [row["missed"] for row in rows if row["what"] == "parity"] == missed
    errors["W_k.bias"] = 0.04
    capsys.readouterr()
    _, rows = rows_of(real_benchmark, "--only", "block", "--precision", "bf16")
    assert rows[1]["missed"] == ["W_k.bias"]
    assert "W_k.bias: 4.00e-02 > 3e-02, one projection against six, block with a window" in capsys.readouterr().out


def test_what_does_not_fit_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--device", "cpu", "--size", "370m", "--batch", "4", "--seq-len", "512"]
    parser = benchmark_options.build_parser("x", "", "x.json")
    free = int(0.9 * device_memory.needed_bytes(benchmark_options.read_settings(parser, asked)))
    monkeypatch.setattr(device_memory, "free_bytes", lambda where: free)
    message = one_line_error(real_benchmark, capsys, *asked)
    assert message.startswith("error: 9 layers of width 1536 at B 4, T 512 in fp32 need about ")
    assert f"cpu has {free / 2**30:.2f} GiB free; these would fit: " in message
    options = message.partition("these would fit: ")[2].split(", ")
    assert [option.split()[0] for option in options] == ["--batch", "--seq-len", "--num-layers", "--only", "--size"]
    for option in options:  # each of them alone is enough
        changed = benchmark_options.read_settings(parser, [*asked, *option.split()])
        assert device_memory.needed_bytes(changed) <= free, option
    few, some = (benchmark_options.read_settings(parser, [*asked, "--only", "block", "--num-layers", layers]) for layers in ("2", "3"))
    assert device_memory.needed_bytes(few) < device_memory.needed_bytes(some)  # a block with a window beside the one with a matrix
    assert "--size" not in one_line_error(real_benchmark, capsys, *asked, "--ffn-dim", "3000").partition("fit: ")[2]
    monkeypatch.setattr(device_memory, "free_bytes", lambda where: 1)
    assert "no smaller batch, length or depth would fit" in one_line_error(real_benchmark, capsys, *asked)


def test_memory_that_runs_out_all_the_same_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def runs_out(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(real_benchmark, "build_model", runs_out)
    message = one_line_error(real_benchmark, capsys, *TINY, "--output", "rows.json")
    assert "3 layers of width 32 at B 1, T 16 in fp32 ran out of the memory of cpu; " in message
    assert {row["what"] for row in json.loads(Path("rows.json").read_text())} == {"parity", "block"}  # what was measured is kept


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--num-heads", "3"], "num_heads = 3 does not divide model_dim = 32"),
        (["--output", "missing/x.json"], "--output: no folder missing; make it first"),
        (["--batch", "0"], "--batch: '0' is no whole number of at least 1"),
        (["--size", "8b"], "--size: invalid choice: '8b' (choose from "),
        (["--device", "tpu"], "--device: 'tpu' is no device of ours"),
        (["--sequence", "4"], "unknown option --sequence; did you mean --seq-len?"),
        (["--zzzz"], "unknown option --zzzz; --help lists them"),
        (["--ncu"], "unknown option --ncu"),  # of the other script
    ],
)
def test_bad_options_end_with_exit_code_2(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in one_line_error(real_benchmark, capsys, *TINY, *options)


def test_sizes_are_those_of_the_shipped_configs() -> None:
    parser = benchmark_options.build_parser("x", "", "x.json")
    settings = benchmark_options.read_settings(parser, ["--device", "cpu", "--size", "370m"])
    assert (settings.config.model_dim, settings.config.num_layers, settings.config.ffn_width) == (1536, 9, 3584)
    assert settings.config.use_uboo is False
    wider = benchmark_options.read_settings(parser, ["--device", "cpu", "--size", "370m", "--model-dim", "512"])
    assert wider.config.ffn_width == 1280  # the rule's, not the preset's
    assert {name: benchmark_options.preset(name).model_dim for name in benchmark_options.PRESETS}["7b"] == 4096


def test_what_ncu_prints_is_added_up() -> None:
    head = '==PROF== Profiling "gemm" - 0: 0%\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
    lines = [f'"{index}","gemm","{name}","byte","{value}"' for index, (name, value) in enumerate(zip(METRICS * 2, "1234", strict=True))]
    other = '"9","gemm","gpu__time_duration.sum","ns","77"'
    assert read_report(head + "\n".join([*lines, other])) == (10, None)
    refused = "==ERROR== ERR_NVGPUCTRPERM - no permission to read the counters\n"
    assert read_report(refused) == (None, "ncu: ERR_NVGPUCTRPERM - no permission to read the counters")
    assert read_report("") == (None, "ncu printed no figures")
    parser = benchmark_options.build_parser("x", "", "x.json")
    parser.add_argument("--ncu", action="store_true")
    assert dram_bytes(benchmark_options.read_settings(parser, ["--device", "cpu", "--ncu"]), hem=True).reason == "no CUDA device"


def test_a_script_runs_by_its_path(tmp_path: Path) -> None:
    script = Path(real_benchmark.__file__)
    command = [sys.executable, str(script), *TINY, "--only", "block"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert json.loads((tmp_path / "benchmark_results.json").read_text())[0]["parity"] == "ok"
    assert "benchmark_results.json" in answer.stdout


@pytest.mark.parametrize("window_every", [None, 1])
@pytest.mark.parametrize("use_dpg", [False, True])
def test_plain_passes_are_the_same_function(use_dpg: bool, window_every: int | None) -> None:
    block = MMRecBlock(model_dim=32, num_heads=2, pe_dim=8, use_dpg=use_dpg, dpg_rank=4, window_every=window_every, window=5)
    if block.convolution is not None:  # at first a token's q and k are its own alone
        for gain in block.convolution.parameters():
            torch.nn.init.normal_(gain)
    x = torch.randn(2, 9, 32)
    with RecordedOperators() as fused:
        expected = block(x)
    with RecordedOperators() as plain:
        actual = with_plain_passes(lambda: block(x))()
    assert_same(actual, expected)
    passes = {"rms_norm", "head_decay", "memory_address_scaled", "gated_read_out", "swiglu"}
    memory = {"memory_scan_kept"} if window_every is None else {"short_convolution", "window_attention"}
    assert set(fused.names) == {*passes, "gated_scan_from_logits", *memory}
    assert plain.names == ["gated_scan", "memory_scan" if window_every is None else "window_attention"]
    with RecordedOperators() as after:
        block(x)
    assert after.names == fused.names
