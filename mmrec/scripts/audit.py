"""Whether pinned versions have known faults: by `known_bad_versions.csv` anywhere, by pip-audit where its data can be reached.

`make audit` calls it. pip-audit alone ends well also where it could look at no package, as with an index that is a mirror of files: here
the packages that it looked at are counted, and where there are none that is said.
"""

import csv
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from mmrec.commandline.plain_parser import PlainParser

ROOT = Path(__file__).parents[2]
CONSTRAINTS, KNOWN = ROOT / "constraints.txt", ROOT / "known_bad_versions.csv"
FAULTY = 1  # exit code
_TIMEOUT = 600  # seconds


def pins(lines: Iterable[str]) -> dict[str, str]:
    """Versions by canonical name.

    Raises:
        ValueError: a line that is no `name==version`.
    """
    found: dict[str, str] = {}
    for line in (line.partition("#")[0].strip() for line in lines):
        if not line:
            continue
        try:
            requirement = Requirement(line)
        except InvalidRequirement as error:
            raise ValueError(f"constraints.txt: {line!r} is no requirement; write name==version") from error
        exact = [one for one in requirement.specifier if one.operator == "==" and not one.version.endswith("*")]
        if len(requirement.specifier) != 1 or not exact:
            raise ValueError(f"constraints.txt: {line!r} pins no exact version; write name==version")
        found[canonicalize_name(requirement.name)] = exact[0].version
    return found


def known_faults(versions: dict[str, str], rows: Iterable[dict[str, str]]) -> list[str]:
    """A line for each of `versions`, by canonical name, that a row of known_bad_versions.csv speaks of."""
    found = []
    for row in rows:
        given = versions.get(canonicalize_name(row["package"]))
        if given is not None and SpecifierSet(row["versions"]).contains(given, prereleases=True):
            found.append(f"{row['package']} {given}: {row['fault']} ({row['source']})")
    return found


def known_rows() -> list[dict[str, str]]:
    """Rows of known_bad_versions.csv: package, versions, fault, source."""
    with KNOWN.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def audited(report: str) -> tuple[int, list[str]]:
    """From pip-audit's JSON: how many packages it could look at, and a line for each fault.

    Raises:
        ValueError: no such JSON.
    """
    looked_at, found = 0, []
    for package in json.loads(report)["dependencies"]:
        if "skip_reason" in package:
            continue
        looked_at += 1
        found += [f"{package['name']} {package['version']}: {fault['id']}" for fault in package["vulns"]]
    return looked_at, found


def _pip_audit(program: str) -> tuple[int, list[str]]:
    """As `audited`; no package where it cannot run."""
    most = 0
    faults: list[str] = []
    for service in ("pypi", "osv"):
        command = [program, "--no-deps", "--disable-pip", "--progress-spinner", "off", "-f", "json", "-s", service, "-r", str(CONSTRAINTS)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
            looked_at, found = audited(done.stdout)
        except (OSError, subprocess.TimeoutExpired, ValueError, KeyError, TypeError):
            continue  # not installed, or no way to its data
        most, faults = max(most, looked_at), [*faults, *found]
    return most, sorted(set(faults))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what was looked at; leave with exit code 1 where a fault is known."""
    parser = PlainParser(prog="python -m mmrec.scripts.audit", description="Known faults of the pinned and the installed versions.")
    parser.add_argument("--pip-audit", default="pip-audit", help="The program; default: the one on the path.")
    options = parser.parse_args(arguments)
    pinned, rows = pins(CONSTRAINTS.read_text(encoding="utf-8").splitlines()), known_rows()
    faults = [*known_faults(pinned, rows), *(f"installed: {line}" for line in known_faults(_installed(pinned), rows))]
    print(
        f"{len(pinned)} pinned versions and the installed ones compared with {len(rows)} known faults of {KNOWN.name}: {len(faults)} found"
    )
    looked_at, found = _pip_audit(options.pip_audit)
    if looked_at:
        print(f"pip-audit looked at {looked_at} of {len(pinned)} packages: {len(found)} faults")
    else:
        print("pip-audit could look at no package (not installed, or neither PyPI's nor OSV's data can be reached): the above is all")
    for fault in [*faults, *found]:
        print(f"error: {fault}", file=sys.stderr)
    if faults or found:
        raise SystemExit(FAULTY)


def _installed(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
