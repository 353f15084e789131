"""Loss by position: against the loss computed directly, its statistics on made-up losses, and the command on a CPU."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import assert_same

from datamodules.sample import ensure_sample
from datamodules.tokenizer import Tokenizer, load_tokenizer
from mmrec.baselines import BaselineConfig, BaselineModel
from mmrec.commandline.errors import BadInputError
from mmrec.model import MMRecModel
from mmrec.scripts import length_curve
from mmrec.studies import length as length_module
from mmrec.studies import plan
from mmrec.studies.books import Book, Windows, read_books, windows_of
from mmrec.studies.length import losses_of, spans, summarised
from mmrec.studies.length_report import verdicts
from mmrec.studies.statistics import clustered_mean


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in text's tokens with the vocabulary of --quick."""
    return ensure_sample(tmp_path_factory.mktemp("sample"), 1024)


@pytest.fixture
def _sample_made(sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command finds the built-in text instead of making it in its temporary folder."""
    monkeypatch.setattr(length_curve, "quick", lambda study, folder: plan.quick(study, sample.parents[1]))


@pytest.fixture(scope="module")
def tokenizer(sample: Path) -> Tokenizer:
    return load_tokenizer(sample / "tokenizer.json")


def _mm_rec() -> MMRecModel:
    return MMRecModel(vocab_size=40, model_dim=16, num_layers=2, num_heads=2, ffn_dim=16, use_uboo=False).eval()


def _transformer() -> BaselineModel:
    return BaselineModel(BaselineConfig(vocab_size=40, model_dim=16, num_layers=2, num_heads=2, ffn_dim=16, max_length=8)).eval()


@pytest.mark.parametrize("make", [_mm_rec, _transformer])
@pytest.mark.parametrize("restart", [None, 8])
@torch.no_grad()
def test_the_losses_are_those_computed_directly(make: Any, restart: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    network = make()
    for parameter in network.parameters():
        parameter.mul_(8)  # so that positions differ by more than rounding
    windows = Windows(np.random.default_rng(0).integers(0, 40, (3, 33)).astype(np.int32), ["a", "a", "b"])
    monkeypatch.setattr(length_module, "_TOKENS_TOGETHER", 2 * (restart or 32))  # two at a time: the last batch has one
    monkeypatch.setattr(length_module, "_LOGITS_TOGETHER", 10)
    tokens = torch.from_numpy(windows.tokens).long()
    expected = torch.empty(3, 32)
    for row in range(3):
        for start in range(0, 32, restart or 32):
            end = start + (restart or 32)
            logits = network(tokens[row : row + 1, start:end])[0]
            expected[row, start:end] = F.cross_entropy(logits, tokens[row, start + 1 : end + 1], reduction="none")
    assert_same(torch.from_numpy(losses_of(network, windows, restart)), expected)


def test_the_bins_follow_each_other_and_the_last_quarter_is_judged() -> None:
    *bins, far = spans(2048, 16384)
    edges = [0, 256, 512, 1024, 2048, 4096, 6144, 8192, 10240, 12288, 14336, 16384]
    assert [(span.start, span.end) for span in bins] == list(pairwise(edges))
    assert (far.what, far.start, far.end) == ("far", 12288, 16384)
    assert spans(128, 256)[-1][1:] == (128, 256)
    assert spans(128, 384)[-1][1:] == (256, 384)


def test_standard_errors_take_books_for_independent() -> None:
    # Equal groups: that of the groups' means; the mean itself is over samples.
    mean, error = clustered_mean([1.0, 3.0, 5.0, 7.0], ["a", "a", "b", "b"])
    assert (mean, error) == (4.0, pytest.approx(np.std([2.0, 6.0], ddof=1) / math.sqrt(2)))
    assert clustered_mean([1.0, 2.0, 6.0], ["a", "b", "b"])[0] == 3.0
    assert clustered_mean([1.0, 2.0], ["a", "a"]) == (1.5, None)
    # Without groups of several it is the usual one.
    values = np.random.default_rng(0).normal(size=50)
    assert clustered_mean(values, [str(number) for number in range(50)])[1] == pytest.approx(values.std(ddof=1) / math.sqrt(50))


def _made_up(rise: float) -> list[dict[str, Any]]:
    """Rows of losses that rise by so much from position 128 on, in books that differ by far more."""
    generator = np.random.default_rng(1)
    books = [f"book {number}" for number in range(6) for _ in range(3)]
    restarted = 3.0 + np.repeat(generator.normal(size=(6, 1)), 3, 0) + 0.01 * generator.normal(size=(18, 256))
    losses = restarted + np.where(np.arange(256) < 128, 0, rise)
    rows = summarised(losses.astype(np.float32), restarted.astype(np.float32), books, 64)
    common = {
        "model": "mm-rec", "variant": None, "params_m": 35.0, "tokens_m": 98.0, "trained_on": "books", "lr": 1e-3, "seed": 0, "length": 256,
        "trained_length": 64, "gpu": "H100",
    }  # fmt: skip
    return [common | row for row in rows]


def test_a_rise_is_found_between_books_that_differ_by_more() -> None:
    rows = _made_up(0.05)
    by_start = {(row["what"], row["position_from"]): row for row in rows}
    far = by_start["far", 192]
    assert far["rise"] == pytest.approx(0.05, abs=0.002)
    assert far["over_restarted"] == pytest.approx(0.05, abs=1e-5)
    assert far["standard_error"] > 20 * far["rise_standard_error"] > 0
    assert by_start["bin", 64]["rise"] == pytest.approx(0.0, abs=0.002)
    assert by_start["bin", 32]["rise"] == 0.0
    assert by_start["bin", 32]["over_restarted"] is None
    assert (far["windows"], far["books"]) == (18, 6)
    (line,) = verdicts(rows)
    assert "read 256 at a time on H100: at 192–255 the loss is HIGHER (+0.0" in line
    assert "than that at 32–63 of the same 18 windows of 6 books" in line
    (line,) = verdicts(_made_up(0.0))
    assert "the loss does not differ beyond 2.57 standard errors (" in line
    (line,) = verdicts(_made_up(-0.05))
    assert "the loss is lower (-0.0" in line


@pytest.mark.parametrize(("books", "judged"), [(3, "does not differ beyond 4.30 standard errors"), (40, "is HIGHER")])
def test_few_books_need_more_standard_errors(books: int, judged: str) -> None:
    far = {row["what"]: row for row in _made_up(0.0)}["far"]
    (line,) = verdicts([far | {"books": books, "rise": 0.03, "rise_standard_error": 0.01}])
    assert f"the loss {judged} (+0.0300 ± 0.0100)" in line


def test_books_are_joined_in_order_and_read_from_their_start(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pieces = {number: f"Piece {number} of the book. " * 3 for number in (0, 1, 2, 4)}
    records = [{"text": text, "url": f"x:B#{number}"} for number, text in sorted(pieces.items(), reverse=True)]
    (tmp_path / "b.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    books = read_books([str(tmp_path / "b.jsonl")], tokenizer)
    assert [book.name for book in books] == ["x:B", "x:B"]  # cut where piece 3 is missing, but one book
    whole = "\n\n".join(pieces[number] for number in range(3))
    assert tokenizer.decode(books[0].tokens.tolist()) == whole
    windows = windows_of(books, 16)
    assert windows.tokens[0].tolist() == books[0].tokens[:17].tolist()
    assert windows.tokens[1].tolist() == books[0].tokens[16:33].tolist()
    assert set(windows.books) == {"x:B"}
    exact = Book("y", np.arange(33, dtype=np.int32))
    assert [row.tolist() for row in windows_of([exact], 16).tokens] == [list(range(17)), list(range(16, 33))]
    with pytest.raises(BadInputError, match=r"^no book has the 34 tokens of a window, the longest has 33; give less with --lengths$"):
        windows_of([exact], 33)


def test_a_copy_of_a_piece_is_no_book_of_its_own(tmp_path: Path, tokenizer: Tokenizer) -> None:
    urls = ["x:B#0", "x:B#1", "x:B#1", "x:C#3", "x:page", None]
    records = [{"text": f"Text {number}.", "url": url} for number, url in enumerate(urls)]
    (tmp_path / "b.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    books = read_books([str(tmp_path / "b.jsonl")], tokenizer)
    assert [book.name for book in books] == ["x:B", "x:B", "x:C", "x:page", "text 4"]
    assert tokenizer.decode(books[1].tokens.tolist()) == "Text 2."


@pytest.mark.usefixtures("_sample_made")
def test_the_command_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--steps", "6", "--lengths", "256", "512", "--output", "rows.json"]
    assert length_curve.main(["--quick", "--arms", "mm-rec", "transformer++", *sizes]) == 0
    rows = json.loads(Path("rows.json").read_text())
    printed = capsys.readouterr().out
    assert len(rows) == 2 * (6 + 8)
    for row in rows:
        assert (row["study"], row["trained_on"], row["trained_length"], row["steps"], row["seed"]) == ("length", "sample", 128, 6, 0)
        assert 0 < row["loss"] < 10
        assert 0 < row["standard_error"] < 1
        assert (row["books"], row["gpu"][:5]) == (4, "cpu: ")
    assert [row["position_to"] for row in rows[:6]] == [16, 32, 64, 128, 256, 256]
    assert {(row["model"], row["length"]) for row in rows} == {(m, n) for m in ("mm-rec", "transformer++") for n in (256, 512)}
    assert "         128–255" in printed
    assert printed.count("of the same tokens, read anew every 128") == 4

    assert length_curve.main(["--quick", "--arms", "mm-rec", "transformer++", *sizes, "--only-missing"]) == 0
    assert capsys.readouterr().out.startswith("2 of 2 runs are in rows.json\n")
    assert length_curve.main(["--quick", *sizes]) == 0  # the same network once more
    again = json.loads(Path("rows.json").read_text())
    assert len(again) == len(rows)
    assert [row["loss"] for row in again[14:]] == [row["loss"] for row in rows[:14]]


@pytest.mark.usefixtures("_sample_made")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "300"], "--lengths 300: give twice the training's 128 tokens, or a larger multiple of them"),
        (["--lengths", "65536"], "no book has the 65,537 tokens of a window, the longest has "),
        (["--books", "nowhere.jsonl"], "--books: no file matches 'nowhere.jsonl'"),
        (["--tokenizer", "nowhere.json"], "no tokenizer file nowhere.json"),
        (["--arms", "nothing"], "no arm nothing; give a YAML file, or one of mm-rec, "),
    ],
)
def test_bad_options_are_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        length_curve.main(["--quick", *options, "--output", "rows.json"])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
