"""The README's figures are those of the JSON files they link to, and its code runs."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUN = re.compile(r"^\| \[[^\]]*\]\((benchmarks/results/\S+\.json)\) \|(.*)\|$", re.MULTILINE)


def test_the_table_of_runs_is_what_was_measured() -> None:
    rows = RUN.findall(README)
    assert len(rows) >= 2
    for path, cells in rows:
        measured = json.loads((ROOT / path).read_text())
        validation = [value for _, value in measured["curves"]["val/loss"]]
        expected = [measured["device"], str(measured["steps"]), f"{validation[0]:.3f}", f"{validation[-1]:.3f}"]
        assert [cell.strip() for cell in cells.split("|")] == expected, path


def test_every_linked_file_is_there() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.filterwarnings("ignore:set_hem changed the parameters:UserWarning")
def test_the_python_code_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["loss"].ndim == 0
    assert not names["model"].blocks[0].use_hem
