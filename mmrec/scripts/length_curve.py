"""Whether a network trained on 2,048 tokens goes on reading well: loss by position in windows of held-out books of 16,384 tokens.

`python -m mmrec.scripts.length_curve --books 'books/validation.*.jsonl.xz'` trains a network and reads the books, in one process. It
writes length_<gpu>.json, a row a bin of positions, and length_<gpu>.png, and says whether the loss rises. With `--tokens-dir
tokens/books_joined` it trains on whole books, as `python -m mmrec.cli prepare --join_pieces true` makes them. Rows of other networks that
the file holds stay in it.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

if not __package__:  # run by path: this folder must not stand first, and a checkout need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from datamodules.documents import resolve_files
from datamodules.sample import ensure_sample
from datamodules.tokenizer import Tokenizer, load_tokenizer
from mmrec.commandline.errors import BadInputError, one_line_errors
from mmrec.commandline.plain_parser import PlainParser, output_file, whole_number
from mmrec.measuring.machine import device, device_name, short_name
from mmrec.studies.books import read_books, windows_of, write_sample_books
from mmrec.studies.length import BIN, IDENTITY, STUDY, Evaluation, check_length, descriptions, measure, trained_length
from mmrec.studies.length_report import draw, table, verdicts
from mmrec.studies.options import add_study_options, changed, require_gpu
from mmrec.studies.plan import DEFAULT, Study, quick
from mmrec.studies.row_file import RowFile
from mmrec.studies.running import Plan, carry_out, finish
from mmrec.studies.runs import Row, Run

_STUDY = Study(name=STUDY, what="loss by position beyond the training's length", arms=(DEFAULT,), tokens_m=98.14)
_LENGTHS, _QUICK_LENGTHS = (16_384,), (1_024,)


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = PlainParser(prog="length_curve", description=__doc__.splitlines()[0])
    add_study_options(parser)
    parser.add_argument("--books", nargs="+", help="JSON-lines files of held-out books, whole or in pieces whose url is NAME#NUMBER")
    parser.add_argument("--tokenizer", type=Path, help="its tokenizer.json (default: the tokens folder's)")
    parser.add_argument("--lengths", nargs="+", type=whole_number, help="tokens of the windows read (default: 16384)")
    parser.add_argument("--output", type=output_file, help="the JSON file to write (default: length_<gpu>.json)")
    parser.add_argument("--quick", action="store_true", help="half a minute on a CPU: a tiny network and books of invented words, 60 steps")
    return parser


def chosen(options: argparse.Namespace, folder: Path) -> list[Run]:
    """The runs, with what the options change in them."""
    if options.quick:
        return changed(replace(quick(_STUDY, folder), seeds=(0,)), options).runs()
    require_gpu()
    return changed(_STUDY, options).runs()


def evaluation(options: argparse.Namespace, runs: Sequence[Run], folder: Path) -> Evaluation:
    """What the trained networks shall read, checked before any of them is trained.

    Raises:
        BadInputError: no books, books too short, a tokenizer of another vocabulary.
    """
    books = options.books
    if options.quick and not books:
        write_sample_books(folder / "books.jsonl")
        books = [str(folder / "books.jsonl")]
    if not books:
        raise BadInputError("--books is missing: give JSON-lines files of books that were not trained on")
    files = resolve_files(books, "--books")
    lengths = tuple(options.lengths or (_QUICK_LENGTHS if options.quick else _LENGTHS))
    for length in lengths:
        check_length(length, trained_length(runs[0]))
    tokenizer = _tokenizer(options, runs[0])
    for run in runs:
        if run.network.vocab_size != tokenizer.vocab_size:
            raise BadInputError(
                f"{tokenizer.path} has {tokenizer.vocab_size:,} tokens, the network {run.network.vocab_size:,}; "
                "give --tokenizer the one of --tokens-dir"
            )
    found = read_books(files, tokenizer)
    for length in lengths:
        windows_of(found, length)
    return Evaluation(tuple(found), lengths)


def _tokenizer(options: argparse.Namespace, run: Run) -> Tokenizer:
    spec = run.content["data"]["init_args"]
    if options.tokenizer is not None:
        return load_tokenizer(options.tokenizer)
    folder = ensure_sample(spec["cache_dir"], spec["vocab_size"]) if spec["source"] == "sample" else Path(spec["tokens_dir"])
    return load_tokenizer(folder / "tokenizer.json")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, read, write, draw, print.

    Args:
        arguments: what follows the program's name; None: `sys.argv`.

    Returns:
        The exit code: 1 where a run failed. Bad options end in one line and exit code 2.
    """
    parser = build_parser()
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        options = parser.parse_args(arguments)
        file = RowFile(options.output or Path(f"length_{short_name(device_name(device()))}.json"), IDENTITY)

        def keep(rows: list[Row]) -> str:
            file.put(rows)
            file.write()
            bins = [row for row in rows if row["what"] == BIN]
            return f"{bins[0]['val_loss']:.4f} nats held out, {bins[-1]['loss']:.4f} at the end of {bins[-1]['length']:,} tokens"

        def plan() -> Plan:
            runs = chosen(options, Path(folder))
            books = evaluation(options, runs, Path(folder))
            return Plan(partial(measure, evaluation=books), runs, partial(descriptions, evaluation=books))

        failures = carry_out(options, file, plan, keep)
        picture = draw(file.path.with_suffix(".png"), file.rows)
        return finish([table(file.rows), *verdicts(file.rows), picture, f"rows: {file.path}"], failures)


if __name__ == "__main__":
    sys.exit(main())
