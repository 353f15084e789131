"""Where the document's figures come from: the JSON files of benchmarks/results, each kind with the command that writes it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mmrec.commandline.errors import BadInputError
from mmrec.measuring.results import read_rows

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A kind of result.

    Attributes:
        pattern: of its files' names, one a GPU.
        command: writes one, on a GPU.
        unlike: beginning of names that the pattern takes and that are of another kind.
        owed: whether it may be missing: its tables then say so instead of being filled.
    """

    pattern: str
    command: str
    unlike: str = "\0"
    owed: bool = True

    def has_script(self) -> bool:
        """Whether what the command runs is written already."""
        words = self.command.split()
        return (ROOT / (f"{words[2].replace('.', '/')}.py" if words[1] == "-m" else words[1])).is_file()


HEM = Source("hem_*.json", "python -m mmrec.scripts.benchmark_hem --size 7b --ncu --output benchmarks/results/hem_<gpu>.json", "hem_parity")
NETWORK = Source(
    "benchmark_results_*.json", "python -m mmrec.scripts.real_benchmark --size 7b --output benchmarks/results/benchmark_results_<gpu>.json"
)
TRAINING = Source("train_step_*.json", "python benchmarks/train_step.py")
DECODING = Source("decode_*.json", "python benchmarks/decode.py", "decode_tiles")
OPERATORS = Source("ops_*.json", "python benchmarks/operators.py", owed=False)
STUDY = Source("convergence_*.json", "python -m mmrec.scripts.train_uboo_test")


class Measured(NamedTuple):
    """The rows of one file."""

    path: Path
    rows: list[Row]

    @property
    def date(self) -> str:
        """Of its newest row; empty where none says."""
        return max((str(row.get("date") or "") for row in self.rows), default="")


@dataclass(frozen=True)
class Results:
    """The results in a folder."""

    folder: Path = RESULTS

    def of(self, source: Source) -> Measured | None:
        """The newest file of a kind that was measured on a GPU; None where one is owed and not there.

        Raises:
            BadInputError: one that is not owed is missing, or a file that is no list of rows.
        """
        files = [path for path in sorted(self.folder.glob(source.pattern)) if not path.name.startswith(source.unlike)]
        try:
            found = [Measured(path, read_rows(path)) for path in files]
        except ValueError as error:
            raise BadInputError(str(error)) from error
        on_gpu = [measured for measured in found if measured.rows and not all(is_cpu(row) for row in measured.rows)]
        if on_gpu:
            return max(on_gpu, key=lambda measured: (measured.date, measured.path.name))
        if source.owed:
            return None
        raise BadInputError(f"no {self.folder / source.pattern}: write one on a GPU with `{source.command}`, or take it from the history")


def is_cpu(row: Row) -> bool:
    """Whether a row was measured without a GPU."""
    return str(row.get("gpu") or "").startswith("cpu")


def first(rows: Iterable[Row], **wanted: Any) -> Row:
    """The first row with these values; an empty one where there is none, whose cells are all unknown."""
    return next(with_values(rows, **wanted), {})


def with_values(rows: Iterable[Row], **wanted: Any) -> Iterable[Row]:
    """The rows with these values."""
    return (row for row in rows if all(row.get(key) == value for key, value in wanted.items()))


def groups(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[tuple[Any, list[Row]]]:
    """Rows by key, in the order in which the keys appear."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return list(found.items())


def values(rows: Sequence[Row], key: str) -> list[Any]:
    """The different values of a key, unknown ones left out, in the order in which they appear."""
    return list(dict.fromkeys(row[key] for row in rows if row.get(key) is not None))
