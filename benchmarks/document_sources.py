"""Where the document's figures come from: the JSON files of benchmarks/results, each kind with the command that writes it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mmrec.commandline.errors import BadInputError
from mmrec.measuring.results import read_rows

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Source:
    """A kind of result.

    Attributes:
        pattern: of its files' names, one a GPU.
        command: writes one, on a GPU.
        unlike: beginning of names that the pattern takes and that are of another kind.
        owed: whether it may be missing: its tables then say so instead of being filled.
        setting: what the tables show, as a key of the rows and its value: a file that holds it goes before one that does not.
    """

    pattern: str
    command: str
    unlike: str = "\0"
    owed: bool = True
    setting: tuple[str, Any] | None = None

    def has_script(self) -> bool:
        """Whether what the command runs is written already."""
        words = self.command.split()
        return (ROOT / (f"{words[2].replace('.', '/')}.py" if words[1] == "-m" else words[1])).is_file()


OF_7B = ("D", 4096)  # rows of the founding document's network

HEM = Source(
    "hem_*.json",
    "python -m mmrec.scripts.benchmark_hem --size 7b --ncu --output benchmarks/results/hem_<gpu>.json",
    "hem_parity",
    setting=OF_7B,
)
NETWORK = Source(
    "benchmark_results_*.json",
    "python -m mmrec.scripts.real_benchmark --size 7b --output benchmarks/results/benchmark_results_<gpu>.json",
    setting=OF_7B,
)
TRAINING = Source("train_step_*.json", "python benchmarks/train_step.py")
DECODING = Source("decode_*.json", "python benchmarks/decode.py", "decode_tiles", setting=OF_7B)
OPERATORS = Source("ops_*.json", "python benchmarks/operators.py", owed=False)
STUDY = Source("convergence_*.json", "python -m mmrec.scripts.train_uboo_test")
RECALL = Source("recall_*.json", "python -m mmrec.scripts.recall_curve --output benchmarks/results/recall_<gpu>.json")
LENGTH = Source(
    "length_*.json",
    "python -m mmrec.scripts.length_curve --books 'books/validation.*.jsonl.xz' --output benchmarks/results/length_<gpu>.json",
)
SOURCES = (HEM, NETWORK, TRAINING, DECODING, OPERATORS, STUDY, RECALL, LENGTH)


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
    """The results in a folder.

    Attributes:
        folder: of the JSON files.
        gpu: what the GPU's name must contain, in any case of letters; empty: any GPU.
        verdicts: of the files that were looked at, which are used, or why they are not.
    """

    folder: Path = RESULTS
    gpu: str = ""
    verdicts: dict[str, str] = field(default_factory=dict)

    def of(self, source: Source) -> Measured | None:
        """The file of a kind that is shown; None where one is owed and not there.

        Of those measured on a GPU, and on the one asked for, those go first that hold the source's setting, then the newest, of one day an
        H100's.

        Raises:
            BadInputError: one that is not owed is missing, or a file that is no list of rows.
        """
        files = [path for path in sorted(self.folder.glob(source.pattern)) if not path.name.startswith(source.unlike)]
        try:
            found = [Measured(path, read_rows(path)) for path in files]
        except ValueError as error:
            raise BadInputError(str(error)) from error
        fitting = []
        for measured in found:
            if not measured.rows or all(is_cpu(row) for row in measured.rows):
                self.verdicts[measured.path.name] = "ignored: no row of a GPU"
            elif self.gpu and not any(self.gpu.lower() in str(row.get("gpu")).lower() for row in measured.rows):
                self.verdicts[measured.path.name] = f"ignored: of {', '.join(map(str, values(measured.rows, 'gpu')))}, not of {self.gpu}"
            else:
                fitting.append(measured)
        if fitting:
            used = max(fitting, key=lambda measured: _rank(measured, source))
            for measured in fitting:
                if measured is not used:
                    self.verdicts[measured.path.name] = f"ignored: {_lesser(measured, used, source)}"
            self.verdicts[used.path.name] = "used"
            return used
        if source.owed:
            return None
        where = f" of {self.gpu}" if self.gpu else ""
        raise BadInputError(
            f"no {self.folder / source.pattern}{where}: write one on a GPU with `{source.command}`, or take it from the history"
        )

    def report(self) -> list[str]:
        """A line for each JSON file of the folder: used, or why not."""
        other = "no table shows it"
        return [f"{path.name}: {self.verdicts.get(path.name, other)}" for path in sorted(self.folder.glob("*.json"))]


def holds(measured: Measured, setting: tuple[str, Any] | None) -> bool:
    """Whether a file has rows of a setting; any has where there is none."""
    return setting is None or any(row.get(setting[0]) == setting[1] for row in measured.rows)


def _rank(measured: Measured, source: Source) -> tuple[Any, ...]:
    """The greatest is shown. What is asked for are an H100's figures: another GPU's of the same day do not replace them."""
    h100 = any("H100" in str(row.get("gpu")) for row in measured.rows)
    return holds(measured, source.setting), measured.date, h100, measured.path.name


def _lesser(measured: Measured, used: Measured, source: Source) -> str:
    if source.setting and holds(used, source.setting) and not holds(measured, source.setting):
        return f"no row of {source.setting[0]} {source.setting[1]}, which {used.path.name} has"
    older = measured.date < used.date
    return f"{'older than' if older else 'as old as, and by name before,'} {used.path.name}"


def is_cpu(row: Row) -> bool:
    """Whether a row was measured without a GPU."""
    return str(row.get("gpu") or "").startswith("cpu")


def first(rows: Iterable[Row], **wanted: Any) -> Row:
    """The first row with these values; an empty one where there is none, whose cells are all unknown."""
    return next(with_values(rows, **wanted), {})


def with_values(rows: Iterable[Row], **wanted: Any) -> Iterable[Row]:
    """The rows with these values."""
    return (row for row in rows if all(row.get(key) == value for key, value in wanted.items()))


def groups(rows: Iterable[Item], key: Callable[[Item], Any]) -> list[tuple[Any, list[Item]]]:
    """Rows, or other things, by key, in the order in which the keys appear."""
    found: dict[Any, list[Item]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return list(found.items())


def values(rows: Sequence[Row], key: str) -> list[Any]:
    """The different values of a key, unknown ones left out, in the order in which they appear."""
    return list(dict.fromkeys(row[key] for row in rows if row.get(key) is not None))
