"""The decoding benchmark on the CPU: its rows, its floor against hand arithmetic, and that a wrong decoder is named."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from mmrec.decoding import Decoder
from mmrec.model import MMRecModel

FOLDER = Path(__file__).parents[1] / "benchmarks"
KEYS = {
    "what", "B", "context", "chunk_size", "D", "H", "L", "windows", "ms", "floor_ms", "share_of_floor", "tokens_per_s", "peak_mib", "bytes",
    "copy_tbps", "path", "torch", "triton", "gpu", "date", "size", "precision", "command",
}  # fmt: skip


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The benchmark's modules, which import each other as scripts of one folder do; gone from the interpreter afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    loaded: dict[str, ModuleType] = {name: __import__(name) for name in ("decode", "decode_options", "decode_tiles")}
    yield SimpleNamespace(**loaded)
    for name in [name for name, module in sys.modules.items() if str(FOLDER) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


@pytest.fixture
def brief(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The same, with a copy rate that needs no copy."""
    monkeypatch.setattr(scripts.decode, "copy_rate", lambda where: 0.01)
    return scripts


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's form of the benchmark")
def test_a_run_writes_complete_rows(brief: SimpleNamespace, tmp_path: Path) -> None:
    output = tmp_path / "decode.json"
    assert brief.decode.main(["--longest", "100", "--precision", "bf16", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())
    decoded = [row for row in rows if row["what"] == "decode"]
    assert {row["command"] for row in rows} == {"python benchmarks/decode.py --longest 100 --precision bf16 --output decode.json"}
    assert all(row["limit"] == brief.decode_options.limit_of(row["error_of_step"]) for row in rows if row["what"] == "parity")
    assert {row["what"] for row in rows} == {"parity", "decode", "generate", "prefill"}
    assert [row["context"] for row in decoded if row["B"] == 1][-2:] == [1, 100]
    assert {row["context"] for row in rows if row["what"] == "prefill"} == {25, 50, 100}
    for row in decoded:
        assert row.keys() == KEYS
        assert row["share_of_floor"] == pytest.approx(row["floor_ms"] / row["ms"])
        assert row["floor_ms"] == pytest.approx(row["bytes"] / 0.01e12 * 1e3)
        assert row["peak_mib"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's form of the benchmark")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "no CUDA device; --size tiny --output FILE decodes a tiny network on the CPU"),
        (["--output", "missing/decode.json"], "--output: no folder missing; make it first"),
        (["--output", "."], "--output: . is a folder"),
        (["--size", "tiny", "--longest", "0"], "--longest: '0' is no whole number of at least 1"),
        (["--size", "7b", "--output", "new.json"], "decoding with 7b in fp32 and its fp32 copy needs about "),
        (["--size", "tiny", "--sweep", "--output", "new.json"], "no sweep: the network lies on cpu"),
        (["--size", "tiny", "--output", "held.json"], "held.json holds rows of another network (D 4096, H 32); give another file"),
        (["--size", "tiny", "--output", "broken.json"], "broken.json is no JSON"),
        (["--sise", "tiny"], "unknown option --sise; did you mean --size?"),
    ],
)
def test_what_is_refused_is_one_line(
    brief: SimpleNamespace,
    options: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mmrec.scripts.device_memory.free_bytes", lambda where: 2**33)
    Path("held.json").write_text(json.dumps([{"what": "decode", "D": 4096, "H": 32}]))
    Path("broken.json").write_text("{")
    with pytest.raises(SystemExit) as end:
        brief.decode.main(options)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")
    assert not Path("new.json").exists()


def test_the_floor_by_hand(scripts: SimpleNamespace) -> None:
    model = MMRecModel(vocab_size=10, model_dim=8, num_layers=1, num_heads=2, ffn_dim=6, pe_dim=4, dpg_rank=3, use_dpg=True)
    projection = 8 * (5 * 8 + 4) + 5 * 8 + 4
    gates = 8 * 3 + 3 + 3 * 8 + 8 + 8  # DPG with its biases, w_g
    heads = 2 * 8 + 2 + 2
    rest = 2 * 8 + 8 * 8 + 8 * 12 + 6 * 8 + 2 * 8  # gains of the read-outs, W_o, feed-forward, both norms
    weights = 10 * 8 + 8 + projection + gates + heads + rest
    assert scripts.decode.weight_bytes(model) == 4 * weights
    assert scripts.decode.step_bytes(model, 3) == 4 * (weights + 2 * 3 * (8 + 2 * 4 * 4))
    inside = MMRecModel(vocab_size=10, model_dim=8, num_layers=3, num_heads=2, window_every=3, window=5).bfloat16()
    state = 4 * (3 * 8 + 2 * 8 * 4)  # three layers' h, two matrices
    tokens = 5 * (2 * 2 * 8 + 4 * 2)  # keys, values, decays: four read, one written
    recent = 4 * 2 * 2 * 8  # q and k: three tokens read, one written
    assert scripts.decode.step_bytes(inside, 3) == scripts.decode.weight_bytes(inside) + 3 * (2 * state + tokens + recent)
    alone = MMRecModel(vocab_size=10, model_dim=8, num_layers=3, num_heads=2, window_every=3, window=5, window_conv=1).bfloat16()
    assert scripts.decode.step_bytes(alone, 3) == scripts.decode.weight_bytes(alone) + 3 * (2 * state + tokens)
    assert scripts.decode.weight_bytes(inside) - scripts.decode.weight_bytes(alone) == 4 * 2 * 8 * 4  # gains, fp32
    untied = MMRecModel(vocab_size=10, model_dim=8, num_layers=1, tie_embeddings=False)
    tied = MMRecModel(vocab_size=10, model_dim=8, num_layers=1)
    assert scripts.decode.weight_bytes(untied) == scripts.decode.weight_bytes(tied)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's form of the benchmark")
def test_a_wrong_decoder_is_named(brief: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Decoder):
        def step(self, token_ids: torch.Tensor) -> torch.Tensor:
            return super().step(token_ids) * 1.1

    monkeypatch.setattr(brief.decode, "Decoder", Wrong)
    assert brief.decode.main(["--longest", "1", "--output", str(tmp_path / "decode.json")]) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are kernels to sweep on a GPU")
def test_no_sweep_where_there_are_no_kernels(scripts: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no sweep: the network lies on cpu"):
        scripts.decode_tiles.sweep(MMRecModel(vocab_size=10, model_dim=8, num_layers=1), tmp_path / "tiles.json", scripts.decode.token_ms)


def test_a_sweep_keeps_the_present_tiles_unless_others_are_faster(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock of its own: the sweep's choice, not the kernels' time."""
    module = scripts.decode_tiles
    present = module.tiles.read_table()["kernels"]
    faster = {"R": 8, "BW": 512, "num_warps": 4}

    def took(options: dict[str, int]) -> float:
        if options["num_warps"] == 8 and "R" in options:
            raise RuntimeError("out of resources")
        return 0.5 if options == faster else 0.995

    monkeypatch.setattr(module, "unsupported", lambda *_: "")
    monkeypatch.setattr(module, "launches", lambda model, state, logits, kernel: kernel)
    monkeypatch.setattr(module, "replayed_us", lambda kernel, where, clock: took(module.tiles._OVERRIDES[kernel]))
    monkeypatch.setattr(
        module, "whole_step", lambda model, table, clock: (2.0 + (table["out"] == present["out"]) - 0.5 * table["PDL"], 0.0)
    )
    output = tmp_path / "tiles.json"
    module.sweep(MMRecModel(vocab_size=10, model_dim=8, num_layers=1), output, scripts.decode.token_ms)
    table = json.loads(output.read_text())
    assert table["PDL"] == 1
    assert table["kernels"]["out"] == faster
    assert table["kernels"]["memory"] == present["memory"]
    assert table["kernels"].keys() == present.keys()
    assert table["found"]["torch"] == torch.__version__
    assert not any(row["num_warps"] == 8 for row in table["timings"] if "R" in row)


def test_kernels_that_no_layer_has_keep_their_tiles(scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = scripts.decode_tiles
    present = module.tiles.read_table()["kernels"]
    monkeypatch.setattr(module, "unsupported", lambda *_: "")
    monkeypatch.setattr(module, "replayed_us", lambda calls, where, clock: float(module.tiles._OVERRIDES[calls[0].name]["num_warps"]))
    monkeypatch.setattr(module, "whole_step", lambda *_: (1.0, 0.0))
    model = MMRecModel(vocab_size=10, model_dim=8, num_layers=1, num_heads=2, window_every=1, window=4)
    table = module.sweep(model, tmp_path / "tiles.json", scripts.decode.token_ms)
    timed = {row["kernel"] for row in table["timings"]}
    assert timed == present.keys() - {"memory"}
