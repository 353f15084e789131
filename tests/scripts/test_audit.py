"""Pinned versions are exact and free of known faults, and an audit that looked at nothing says so."""

import json
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mmrec.scripts import audit


def test_every_version_is_pinned_within_the_bounds_and_has_no_known_fault() -> None:
    pinned = audit.pins(audit.CONSTRAINTS.read_text().splitlines())
    project = tomllib.loads((audit.ROOT / "pyproject.toml").read_text())["project"]
    needed = [Requirement(line) for line in project["dependencies"]]
    for requirement in needed:
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
    rows = audit.known_rows()
    assert audit.known_faults(pinned, rows) == []
    assert all(row["source"].startswith("https://") for row in rows)
    lightning = next(requirement.specifier for requirement in needed if requirement.name == "lightning")
    for bad in ("2.6.2", "2.6.3", "2.6.5"):
        assert audit.known_faults({"lightning": bad}, rows)
        assert not lightning.contains(bad)


@pytest.mark.parametrize("line", ["torch>=2.11", "torch", "torch==2.*", "torch==2.13.0,!=2.14", "-e ."])
def test_a_version_that_is_not_pinned_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"^constraints\.txt: "):
        audit.pins([line])


def fake_pip_audit(folder: Path, report: str) -> str:
    program = folder / "pip-audit"
    program.write_text(f"#!/bin/sh\necho '{report}'\n")
    program.chmod(0o700)
    return str(program)


def test_an_audit_that_could_look_at_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    skipped = json.dumps({"dependencies": [{"name": "torch", "skip_reason": "not found"}]})
    for program in (fake_pip_audit(tmp_path, skipped), str(tmp_path / "none")):
        audit.main(["--pip-audit", program])
        assert "pip-audit could look at no package" in capsys.readouterr().out


def test_a_fault_that_pip_audit_knows_ends_with_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.dumps({"dependencies": [{"name": "torch", "version": "1.0", "vulns": [{"id": "CVE-1"}]}]})
    with pytest.raises(SystemExit) as end:
        audit.main(["--pip-audit", fake_pip_audit(tmp_path, found)])
    assert end.value.code == audit.FAULTY
    assert "error: torch 1.0: CVE-1" in capsys.readouterr().err
