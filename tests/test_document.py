"""The document of performance: it is what its JSON files give, its samples run, and what is missing is said in one line."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
DOCUMENT = (DOCS / "PERFORMANCE_AND_DEPENDENCIES.md").read_text(encoding="utf-8")
PLACE = {"torch": "2.11.0", "triton": "3.6.0", "gpu": "NVIDIA H100 80GB HBM3", "date": "2026-11-25"}
SIZES = {"model_dim=4096": "model_dim=64", "pe_dim=4096": "pe_dim=64", "num_layers=24": "num_layers=2", ".cuda()": ""}


def written(document: ModuleType, folder: Path, **files: list[dict[str, Any]]) -> str:
    """The document from these files and the operators'."""
    files = {"ops_h200": [], **files}
    for name, rows in files.items():
        content = rows or json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        (folder / f"{name}.json").write_text(json.dumps(content))
    assert document.main(["--results", str(folder), "--output", str(folder / "made.md")]) == 0
    return (folder / "made.md").read_text(encoding="utf-8")


def error_of(document: ModuleType, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    with pytest.raises(SystemExit) as end:
        document.main([*options])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def hem_row(what: str, hem: bool, ms: float, **more: Any) -> dict[str, Any]:
    shape = {"what": what, "B": 4, "T": 2048, "D": 4096, "H": 32, "precision": "bf16", "uboo": False, "direction": "fwd", "hem": hem}
    return shape | {"ms": ms} | more | PLACE


# ---- the committed document


def test_the_document_is_what_its_files_give(document: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert document.main(["--check"]) == 0, f"{capsys.readouterr().out}: run `make docs`"


@pytest.mark.parametrize("name", ["PERFORMANCE_AND_DEPENDENCIES.md", "measuring.md"])
def test_every_linked_and_every_named_file_is_there(name: str) -> None:
    text = (DOCS / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (DOCS / target).exists(), target
    for target in re.findall(r"benchmarks/results/\w+\.json", text.replace("hem_h100.json", "")):  # an example
        assert (ROOT / target).is_file(), target
    headings = {re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in text.splitlines() if line.startswith("#")}
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert anchor in headings, anchor


def test_nothing_of_the_founding_document_is_left_to_be_filled() -> None:
    for blank in ("ÖLÇÜLECEK", "TEORİK", "TBD", "TODO", "table:"):
        assert blank not in DOCUMENT
    for section in ("1.1.1", "1.1.2", "1.1.3", "1.2.1", "1.2.2", "2.1", "2.2.1", "2.2.2", "2.2.3", "2.3.1", "2.3.3", "3.1.1", "3.1.2"):
        assert f"# {section} " in DOCUMENT
    for section in (
        "3.1.3",
        "3.2.1",
        "3.2.2",
        "3.2.3",
        "3.2.4",
        "3.3",
        "4.1",
        "4.2",
        "4.3",
        "4.4",
        "5.1",
        "5.2",
        "5.3",
        "5.4",
        "5.5",
        "6.",
    ):
        assert f"# {section} " in DOCUMENT


def test_the_environment_is_what_doctor_checks() -> None:
    from mmrec.commandline import machine_needs as needs

    for bound in (needs.CUDA, needs.CUDNN, needs.NCCL, *needs.DRIVERS.values(), needs.CAPABILITY):
        assert re.search(rf"\| {re.escape(bound.minimum)} \| {re.escape(bound.recommended)} \|", DOCUMENT), bound
    assert "| PyTorch | 2.0 | 2.1 | 2.11 | 2.11 |" in DOCUMENT
    assert "| CPU cores | 8 | 16 | 8 | 16 |" in DOCUMENT


@pytest.mark.filterwarnings("ignore:set_hem changed the parameters:UserWarning")
@pytest.mark.filterwarnings("ignore:lambda_P:UserWarning")
def test_the_samples_run(capsys: pytest.CaptureFixture[str]) -> None:
    samples = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    assert len(samples) >= 13
    ids = torch.randint(32000, (2, 8))
    names: dict[str, Any] = {"input_ids": ids, "dataloader": [{"input_ids": ids, "labels": ids}] * 2}
    for sample in samples:
        for large, small in SIZES.items():
            sample = sample.replace(large, small)
        exec(compile(sample, "PERFORMANCE_AND_DEPENDENCIES.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "use_hem cannot be assigned" in printed
    assert "Step 1: L_main=" in printed
    assert "Block 1: UBÖO = False" in printed  # of the last model that a sample made before it
    assert names["model"].blocks[0].use_hem


def test_the_sample_of_measuring_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (sample,) = re.findall(r"```python\n(.*?)```", (DOCS / "measuring.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(sample, "measuring.md", "exec"), {})
    assert "aten::" in capsys.readouterr().out


# ---- tables


def test_hem_is_told_with_its_parts_and_its_place(document: ModuleType, tmp_path: Path) -> None:
    rows = [
        hem_row(
            "block", False, 10.0, launches=6, kernels=60, fastest_ms=9.5, slowest_ms=10.5, bytes=1000e6, bytes_ncu_reason="no ncu on PATH"
        ),
        hem_row("block_six_gemms_fused_rest", False, 8.0, launches=6),
        hem_row("block", True, 7.0, launches=1, kernels=30, gemm_only_ms=6.5, bytes=600e6),
        hem_row("forward_24", False, 250.0),
        hem_row("forward_24", True, 175.0, tokens_per_s=46811.0),
        hem_row("block", True, 7.5) | {"H": 8},
    ]
    made = written(document, tmp_path, hem_h100=rows)
    assert "| One block, forward, ms | 10.00 (9.50 … 10.50) | 8.00 | 7.00 | −30 … −40 % | −30.0 % | yes | −12.5 % |" in made
    assert "| Forward pass, 24 layers, ms | 250.00 | – | 175.00 | – | −30.0 % | – | – |" in made
    assert "| One block, forward, HEM | 7.00 | 6.50 | 1.08 × |" in made
    assert "| Launches of the projections, one block's forward | 6 | 1 | −83.3 % | 6 | 6 | 1 | −83.3 % |" in made
    assert "| All, MB (the prediction leaves the outputs out) | 603.99 | 268.44 | −55.6 % | 1,000.00 | 600.00 | −40.0 % |" in made
    assert "*ncu's count: no ncu on PATH.*" in made
    assert "Measured on NVIDIA H100 80GB HBM3 with torch 2.11.0 and Triton 3.6.0, 2026-11-25; it stands in for the A100 80 GB" in made
    assert "`python -m mmrec.scripts.benchmark_hem --size 7b --num-heads 8 --batch 4 --seq-len 2048 --precision bf16 --only block " in made
    assert "| HEM, 32 heads: one block's latency, all of it against eager code | −30 … −40 % | −30.0 % | yes |" in made
    assert "| HEM, 8 heads: one block's latency, all of it against eager code | −30 … −40 % | – | – |" in made
    assert "- **Setting A**: B 4 × T 2048, D 4096, 32 heads, bf16, UBÖO off." in made
    assert re.search(
        r"\*\*Setting B\*\*: .*8 heads.*\n  Not measured yet: the forward of 24 layers .*--num-heads 8 .*--only forward --append", made
    )
    assert "nan" not in made


def test_blocks_with_a_window_have_lines_of_their_own(document: ModuleType, tmp_path: Path) -> None:
    matrices = [
        hem_row("block", False, 10.0, launches=6, bytes_ncu_reason="no ncu on PATH"),
        hem_row("block_six_gemms_fused_rest", False, 8.0),
        hem_row("block", True, 7.0, launches=1),
    ]
    windows = [row | {"memory": "window", "ms": row["ms"] + 1, "launches": 77} for row in matrices]
    told = [row | {"memory": "matrix"} for row in matrices]
    old = written(document, tmp_path, hem_h100=matrices)
    assert "with a window" not in old
    assert written(document, tmp_path, hem_h100=told) == old
    made = written(document, tmp_path, hem_h100=[*windows, *told])  # in whatever order
    new = [line for line in made.splitlines() if line not in old.splitlines()]
    assert new == [
        "- Blocks with a window have lines of their own in the table of latencies; all else said of one block is of one with a matrix.",
        "| One block with a window, forward, ms | 11.00 | 9.00 | 8.00 | – | −27.3 % | – | −11.1 % |",
        "| One block with a window, forward and backward, ms | – | – | – | – | – | – | – |",
    ]
    assert set(old.splitlines()) <= set(made.splitlines())


def test_the_network_is_told_by_its_forward_and_its_layers(document: ModuleType, tmp_path: Path) -> None:
    rows = [
        hem_row("block", True, 7.0, tokens_per_s=1e6),
        hem_row("block", True, 21.0, peak_mib=2871.7) | {"direction": "fwdbwd"},
        hem_row("forward_24", True, 180.0, L=24, gemm_only_ms=160.0, tokens_per_s=45511.1, peak_mib=15000.0),
        *(hem_row("layer", True, ms, layer=index) for index, ms in enumerate((6.9, 7.1))),
        hem_row("head", True, 3.0),
    ]
    made = written(document, tmp_path, benchmark_results_h100=rows)
    assert "| Model forward, 24 layers, ms | 180.00 |" in made
    assert "| Model forward against layers × block + head | 1.05 × |" in made  # 180 / (24 · 7 + 3)
    assert "| Model forward against its matrix products alone | 1.12 × |" in made
    assert "| Latency of a layer within the forward, ms | 6.90 … 7.10, mean 7.00 |" in made
    assert "`python -m mmrec.scripts.real_benchmark --size 7b --num-heads 32 --batch 4 --seq-len 2048 --precision bf16 --output " in made
    assert "with a window" not in made
    rows[2]["windows"] = 8
    assert "| Model forward against layers × block + head | – |" in written(document, tmp_path, benchmark_results_h100=rows)
    of_windows: list[dict[str, Any]] = [
        hem_row("block", True, 6.5, tokens_per_s=2e6),
        hem_row("block", True, 19.0, peak_mib=2500.0) | {"direction": "fwdbwd"},
        *(hem_row("layer", True, ms, layer=index) for index, ms in enumerate((6.3, 6.5), 2)),
    ]
    made = written(document, tmp_path, benchmark_results_h100=[*(row | {"memory": "window"} for row in of_windows), *rows])
    assert "| Block latency, forward, ms | 7.00 |" in made
    assert "| Latency of a layer within the forward, ms | 6.90 … 7.10, mean 7.00 |" in made
    assert "| Model forward against layers × block + head | 1.08 × |" in made  # 180 / (16 · 7 + 8 · 6.5 + 3)
    assert "| Block with a window: latency, forward, ms | 6.50 |" in made
    assert "| Block with a window: latency, forward and backward, ms | 19.00 |" in made
    assert "| Block with a window: throughput of the forward, tokens/s | 2,000,000 |" in made
    assert "| Block with a window: peak memory, forward and backward, MiB | 2,500 |" in made
    assert "| Latency of a layer with a window within the forward, ms | 6.30 … 6.50, mean 6.40 |" in made


def test_rows_that_lack_keys_leave_dashes(document: ModuleType, tmp_path: Path) -> None:
    made = written(
        document, tmp_path, train_step_h100=[{"ms_per_step": 1.0}],
        decode_h100=[{"what": "decode"}], benchmark_results_h100=[{"what": "block"}],
        convergence_h100=[{"study": "protocol", "uboo": "off"}, {"study": "uboo"}, {"study": "finalist"}], hem_h100=[{"what": "block"}],
    )  # fmt: skip
    assert "| decode | – | – | – | – | – | – | – | – | – | – | – |" in made
    assert "Traceback" not in made


def test_training_decoding_and_the_study_are_filled(document: ModuleType, tmp_path: Path) -> None:
    step = {
        "case": "370m",
        "what": "compiled blocks",
        "config": "h100_370m",
        "params_m": 368.0,
        "uboo": False,
        "B": 8,
        "T": 2048,
        "gpus": 1,
        "strategy": "auto",
        "precision": "bf16-mixed",
    }
    step |= {"optimizer": "adamw", "compile": True, "fp8": False, "checkpointing": "none", "tokens_per_s": 200000.4, "ms_per_step": 81.92}
    step |= {"mfu": 0.4567, "peak_gib": 40.0, "first_step_s": 30.0, "peers": {"llama": 95700}, "host_ms": 12.0} | PLACE
    at_7b = {
        "case": "7b_planning",
        "B": 4,
        "T": 2048,
        "extrapolated": "to 24 layers, in a straight line from 2 and 6",
        "optimizer": None,
    } | PLACE
    planning = [
        at_7b | {"uboo": False, "weights_gib": 12.3, "activations_gib": 40.0, "peak_gib": 70.0, "ms_per_step": 700.0},
        at_7b | {"uboo": True, "weights_gib": 13.8, "activations_gib": 41.0, "peak_gib": 77.0, "ms_per_step": 770.0},
    ]
    lost = {"case": "1b3", "failed": "OutOfMemoryError: 80 GiB"} | PLACE
    decode = {
        "what": "decode",
        "path": "fused",
        "B": 1,
        "context": 1000000,
        "D": 4096,
        "H": 32,
        "L": 24,
        "ms": 5.0,
        "floor_ms": 4.4,
        "share_of_floor": 0.88,
    } | PLACE
    checked = {"what": "parity", "agrees": True} | PLACE
    of_study = {"study": "protocol", "steps": 10000, "tokens_m": 81.9} | PLACE
    study = [
        of_study | {"uboo": uboo, "seed": seed, "val_loss": 3.0 + loss, "steps_to_baseline": steps}
        for seed in (0, 1)
        for uboo, loss, steps in (("off", 0.0, 10000), ("mse", 0.0, 9000), ("normalized", 0.1, 8000 + seed))
    ]  # fmt: skip
    study.append(of_study | {"uboo": "off", "seed": 2, "val_loss": 4.0, "steps_to_baseline": 20000})  # the others have no such seed
    made = written(
        document,
        tmp_path,
        train_step_h100=[step, *planning, lost],
        decode_h100=[decode, decode | {"context": 1, "ms": 4.9}, checked],
        convergence_h100=study,
    )
    shape = "| `370m`: compiled blocks | 368 | off | B 8 × T 2048 | bf16-mixed, adamw, compiled "
    assert f"{shape}| 200,000 | 81.9 | 12.0 | 45.7 % | 40.0 | 30.0 | – | llama 95,700 |" in made
    assert "*Not measured: `1b3`: OutOfMemoryError: 80 GiB.*" in made
    assert "| Weights, GiB | 1.50 | 12.30 | 13.80 | +1.50 | +12.2 % |" in made
    assert "| Activations, GiB | 0.25 | 40.00 | 41.00 | +1.00 | +2.5 % |" in made
    assert "nothing recomputed, to 24 layers, in a straight line from 2 and 6. Measured on NVIDIA H100" in made
    assert (
        "| UBÖO: peak memory of forward and backward at 7B | +8 … +10 % (1.5 … 2 GB) | +10.0 % (7.00 GiB) | in percent yes, in bytes no |"
        in made
    )
    assert "*One sequence, 1 to 1,000,000 tokens read: the slowest token takes 2.0 % more than the fastest.*" in made
    assert "*Logits against an fp32 copy's, 1 settings: 0 missed.*" in made
    assert "| decode | fused | L 24, D 4096, H 32 | – | 1 | 1,000,000 | – | 5.000 | 4.400 | 88 % | – | – |" in made
    assert "| 13,333 (10,000 … 20,000) | 9,000 (9,000 … 9,000) | 8,000 (8,000 … 8,001) | −20 … −30 % | −10.0 % | −20.0 % |" in made
    assert (
        "| UBÖO: steps to the baseline's final loss | −20 … −30 % | `mse` −10.0 %, `normalized` −20.0 % | `mse` no, `normalized` yes |"
        in made
    )
    assert "books instead of C4, 10,000 steps, 82 M tokens; seeds: off 3, mse 2, normalized 2" in made


def test_the_newest_file_of_a_gpu_is_taken_and_no_cpus(document: ModuleType, tmp_path: Path) -> None:
    older = [hem_row("block", True, 1.0) | {"date": "2026-11-24", "gpu": "NVIDIA H200"}]
    on_cpu = [hem_row("block", True, 2.0) | {"date": "2027-01-01", "gpu": "cpu: AMD EPYC"}]
    made = written(document, tmp_path, hem_h200=older, hem_h100=[hem_row("block", True, 3.0)], hem_cpu_amd_epyc=on_cpu)
    assert "[hem_h100.json]" in made
    assert "[hem_h200.json]" not in made
    assert "hem_cpu" not in made


def test_of_one_day_an_h100s_goes_first(document: ModuleType, tmp_path: Path) -> None:
    """It is what the figures asked for are of."""
    h200 = [hem_row("block", True, 1.0) | {"gpu": "NVIDIA H200"}]
    assert "[hem_h100.json]" in written(document, tmp_path, hem_h200=h200, hem_h100=[hem_row("block", True, 3.0)])


def test_a_graph_and_a_setting_are_told(document: ModuleType, tmp_path: Path) -> None:
    eager = {"case": "370m_eager", "ms_per_step": 100.0, "loss": 8.96, "loss_step": 25, "cuda_graph": False} | PLACE
    graph = eager | {"case": "370m network.loss_chunk_size=8192", "cuda_graph": True, "precision": "bf16-mixed"}
    made = written(document, tmp_path, train_step_h100=[eager, graph])
    assert (
        "`python benchmarks/train_step.py --only 370m_eager`, `python benchmarks/train_step.py --only 370m --set network.loss_chunk" in made
    )
    assert "| bf16-mixed, CUDA graph |" in made
    assert "| 8.9600 (25) |" in made
    given = eager | {"command": "python benchmarks/train_step.py --only 370m_eager --output rows.json --profile"}
    output = "--output benchmarks/results/train_step_h100.json"
    assert f"written by `python benchmarks/train_step.py --only 370m_eager {output} --profile`." in written(
        document, tmp_path, train_step_h100=[given]
    )


def test_times_whose_ranges_overlap_are_no_difference(document: ModuleType) -> None:
    module = sys.modules["document_markdown"]
    first = {"ms": 7.40, "fastest_ms": 7.23, "slowest_ms": 7.61}
    assert module.change_of_times(first, {"ms": 7.39, "fastest_ms": 7.25, "slowest_ms": 7.40}) == "within the range"
    assert module.change_of_times(first, {"ms": 7.10, "fastest_ms": 7.00, "slowest_ms": 7.20}) == "−4.1 %"
    assert module.change(7.4, 7.3999) == "0.0 %"


def test_a_file_with_the_sections_own_setting_goes_before_a_newer_one(
    document: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [hem_row("block", True, 1.0) | {"D": 1024, "date": "2026-12-01", "gpu": "NVIDIA H200"}]
    made = written(document, tmp_path, hem_h200=small, hem_h100=[hem_row("block", True, 3.0)])
    assert "[hem_h100.json]" in made
    printed = capsys.readouterr().out
    assert "hem_h200.json: ignored: no row of D 4096, which hem_h100.json has" in printed
    assert "hem_h100.json: used" in printed
    assert document.main(["--results", str(tmp_path), "--output", str(tmp_path / "made.md"), "--gpu", "h200"]) == 0
    assert "hem_h100.json: ignored: of NVIDIA H100 80GB HBM3, not of h200" in capsys.readouterr().out
    assert "[hem_h200.json]" in (tmp_path / "made.md").read_text(encoding="utf-8")


def test_the_top_says_what_is_measured_and_what_is_owed(document: ModuleType, tmp_path: Path) -> None:
    made = written(document, tmp_path, hem_h100=[hem_row("block", True, 3.0)])
    assert "| 1.1 HEM | NVIDIA H100 80GB HBM3, 2026-11-25 | the forward of 24 layers; bytes counted by ncu |" in made
    assert "| 4.1 The network as it is | – | all of it |" in made


def test_the_memory_of_a_gpu_is_the_estimates(document: ModuleType) -> None:
    training, decoding = (getattr(sys.modules["document_environment"], f"gpu_for_{name}")() for name in ("training", "decoding"))
    assert (training.card, decoding.card) == (80, 16)
    assert "74.0 GB" in training.why


def test_what_is_not_measured_says_which_command_would(document: ModuleType, tmp_path: Path) -> None:
    made = written(document, tmp_path)
    for command in (
        "mmrec.scripts.benchmark_hem",
        "mmrec.scripts.real_benchmark",
        "benchmarks/train_step.py",
        "recall_curve",
        "length_curve",
    ):
        assert re.search(rf"\*Not measured yet: .*{re.escape(command)}.*`make docs` fills this table\.\*", made), command
    owed_caption = sys.modules["document_markdown"].owed_caption
    source = sys.modules["document_sources"].Source("x_*.json", "python benchmarks/none.py --all")
    assert owed_caption(source).endswith("is not written yet.")


# ---- errors


def test_an_unknown_marker_and_a_forgotten_table_are_one_line(
    document: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "t.md"
    template.write_text("<!-- table: hem_latencyy -->\n")
    assert "no table hem_latencyy; did you mean hem_latency?" in error_of(document, capsys, "--template", str(template))
    template.write_text("<!-- table: hem_latency -->\n")
    assert " is nowhere; put `<!-- table: " in error_of(document, capsys, "--template", str(template))
    assert "no template none.md; give one as --template" in error_of(document, capsys, "--template", "none.md")


def test_a_missing_or_a_broken_file_is_one_line(document: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "ops_*.json: write one on a GPU with `python benchmarks/operators.py`" in error_of(document, capsys, "--results", str(tmp_path))
    for content, said in (("{", "is no JSON"), ('{"rows": []}', "holds no list of rows")):
        (tmp_path / "ops_h100.json").write_text(content)
        line = error_of(document, capsys, "--results", str(tmp_path))
        assert line.startswith(f"error: {tmp_path / 'ops_h100.json'} {said}")


def test_check_finds_another_document(document: ModuleType, tmp_path: Path) -> None:
    other = tmp_path / "other.md"
    other.write_text("typed by hand\n")
    assert document.main(["--check", "--output", str(other)]) == 1
    assert other.read_text() == "typed by hand\n"
