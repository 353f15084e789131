"""Fill docs/PERFORMANCE_AND_DEPENDENCIES.md from its template and the JSON files of benchmarks/results: `make docs`.

The template is prose with markers, `<!-- table: NAME -->` on a line of its own; each stands for a function of that name in
document_*.py. No figure is typed into either. `--check` writes nothing and fails where the document is not what would be written.
"""

import re
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from document_markdown import TABLES
from document_sources import RESULTS, ROOT, Results

from mmrec.commandline.errors import BadInputError, one_line_errors
from mmrec.commandline.plain_parser import PlainParser, output_file
from mmrec.files import write_atomically
from mmrec.nearest import did_you_mean, nearest_name

TEMPLATE = ROOT / "docs" / "performance_and_dependencies.template.md"
DOCUMENT = ROOT / "docs" / "PERFORMANCE_AND_DEPENDENCIES.md"
MODULES = (
    "document_environment", "document_hem", "document_operators", "document_recall", "document_state", "document_study",
    "document_training",
)  # fmt: skip
MARKER = re.compile(r"^<!-- table: (?P<name>\S+) -->$", re.MULTILINE)
HEADER = "<!-- Made by `make docs` from performance_and_dependencies.template.md and benchmarks/results; edit those. -->\n"

for _module in MODULES:  # each registers its tables
    import_module(_module)


def fill(template: str, results: Results) -> str:
    """The document.

    Args:
        template: its text.
        results: what was measured.

    Raises:
        BadInputError: a marker that no function belongs to, a function that no marker asks for, or a file that is missing or no rows.
    """
    names = MARKER.findall(template)
    for name in names:
        if name not in TABLES:
            hint = did_you_mean(nearest_name(name, TABLES)) or "; register one in benchmarks/document_*.py"
            raise BadInputError(f"{TEMPLATE.name}: no table {name}{hint}")
    for name in TABLES:
        if name not in names:
            raise BadInputError(f"{TEMPLATE.name}: table {name} is nowhere; put `<!-- table: {name} -->` on a line, or delete its function")
    return HEADER + MARKER.sub(lambda marker: TABLES[marker["name"]](results), template)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the document, or compare it.

    Args:
        arguments: what follows the program's name; None: `sys.argv`.

    Returns:
        The exit code: 1 where `--check` finds another document.
    """
    parser = PlainParser(description=__doc__.splitlines()[0])
    parser.add_argument("--template", type=Path, default=TEMPLATE, help="prose with markers")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--gpu", default="", help="take results of GPUs whose name contains this alone, as H200; any otherwise")
    parser.add_argument("--output", type=output_file, default=DOCUMENT, help="the document to write")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the document is another")
    options = parser.parse_args(arguments)
    with one_line_errors():
        if not options.template.is_file():
            raise BadInputError(f"no template {options.template}; give one as --template")
        results = Results(options.results, options.gpu)
        text = fill(options.template.read_text(encoding="utf-8"), results)
        print("\n".join(results.report()))
        if options.check:
            same = options.output.is_file() and options.output.read_text(encoding="utf-8") == text
            print(f"{options.output}: {'as made' if same else 'not what `make docs` writes; run it'}")
            return 0 if same else 1
        write_atomically(options.output, text.encode())
        print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
