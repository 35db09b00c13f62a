"""Check the licences of all runtime dependencies against an allow-list, and look for published vulnerabilities.

`make audit` runs this file. The audit checks the licences of all direct and indirect dependencies, for all extras
except `dev`. If a licence is neither on the allow-list nor reviewed, the audit ends with exit code 1. Otherwise,
pip-audit looks up the vulnerabilities of the versions in constraints.txt, and each published vulnerability leads to
exit code 1. If pip-audit is not installed or its advisory service does not answer, the output says that the advisories
were not checked.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]

ALLOWED = {
    *("0BSD", "APACHE-2.0", "APACHE-2.0 WITH LLVM-EXCEPTION", "BSD", "BSD-2-CLAUSE", "BSD-3-CLAUSE", "BSL-1.0"),
    *("CC0-1.0", "CNRI-PYTHON", "ISC", "MIT", "MIT-0", "MIT-CMU", "PSF-2.0", "ZLIB"),
    "MPL-2.0",  # the copyleft of MPL-2.0 covers only the files under MPL-2.0
}
"""Licences that every dependency may have, as SPDX names in capitals. `BSD` is a BSD licence of unknown variant."""

NAMES = {
    "APACHE": "APACHE-2.0",
    "APACHE SOFTWARE": "APACHE-2.0",
    "APACHE 2.0": "APACHE-2.0",
    "BSD 3-CLAUSE": "BSD-3-CLAUSE",
    "3-CLAUSE BSD": "BSD-3-CLAUSE",
    "FREEBSD": "BSD-2-CLAUSE",
    "ISC (ISCL)": "ISC",
    "MOZILLA PUBLIC LICENSE 2.0 (MPL 2.0)": "MPL-2.0",
    "PYTHON SOFTWARE FOUNDATION": "PSF-2.0",
}
"""Dict from names of licences in package metadata to their SPDX names."""

REVIEWED = {
    "cuda-toolkit": "only lists NVIDIA's libraries",
    "huey": "MIT, by its LICENSE file",
    "psycopg": "LGPL-3.0, unchanged and loaded as a library; only in the extra `postgres`",
    "psycopg-binary": "LGPL-3.0, as psycopg",
    "pycocoevalcap": "BSD-2-Clause, with Java programs under GPL and LGPL: docs/decisions/0035-java-programs.md",
    "skops": "MIT, by its LICENSE file",
    "torchao": "BSD-3-Clause, by its LICENSE file",
}
"""Licences that a person has looked up: a dict from the name of a dependency to its licence."""

JAVA_PROGRAMS = {
    "tokenizer/stanford-corenlp-3.4.1.jar": "GPL-2.0, by its POM: `evaluate` runs the program as a separate process",
    "meteor/meteor-1.5.jar": "LGPL-2.1, by its README: `evaluate` runs the program as a separate process",
    "spice/spice-1.0.jar": "AGPL-3.0, by COPYING in the jar: Lakesight never runs the program",
}
"""Licences of the Java programs in pycocoevalcap, except the libraries in spice/lib. Lakesight never runs SPICE."""

NVIDIA = re.compile(r"nvidia-.+")
"""NVIDIA's libraries are proprietary. torch installs them on Linux; NVIDIA's terms allow use and redistribution."""


def declared() -> Iterator[Requirement]:
    """Yield the requirements that pyproject.toml declares, without the development tools."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for group in (project["dependencies"], *(extras[extra] for extra in sorted(extras) if extra != "dev")):
        yield from map(Requirement, group)


def runtime_dependencies() -> dict[str, Distribution | None]:
    """Return all direct and indirect dependencies, as a dict from name to package; None if the package is not
    installed.
    """
    found: dict[str, Distribution | None] = {}
    waiting = [requirement for requirement in declared() if _applies(requirement, set())]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found and not requirement.extras:
            continue
        try:
            found[name] = installed = distribution(name)
        except PackageNotFoundError:
            found[name] = None
            continue
        needed = (each for each in map(Requirement, installed.requires or []) if _applies(each, requirement.extras))
        waiting += [each for each in needed if canonicalize_name(each.name) not in found or each.extras]
    return dict(sorted(found.items()))


def _applies(requirement: Requirement, extras: set[str]) -> bool:
    """Return whether a package that is installed with these extras needs a requirement on this machine."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def licences(package: Distribution) -> set[str]:
    """Return the licences that the metadata of a package names. All returned licences apply at the same time. Of
    alternative licences (`OR`), the first one on the allow-list is returned.
    """
    metadata = package.metadata
    if expression := metadata.get("License-Expression"):
        parts = re.split(r"\s+AND\s+", expression.strip("() "))
        return {
            next((each for each in map(spdx, re.split(r"\s+OR\s+", part)) if each in ALLOWED), spdx(part))
            for part in parts
        }
    classified = [
        each.rsplit(" :: ", 1)[-1] for each in metadata.get_all("Classifier") or [] if each.startswith("License")
    ]
    named = [each for each in classified if each != "OSI Approved"] or [metadata.get("License") or ""]
    return {spdx(part) for each in named for part in re.split(r"\s+AND\s+", each.partition("\n")[0])}


def spdx(name: str) -> str:
    """Return the SPDX name of a licence in capitals, or the given name in capitals if its SPDX name is not known."""
    short = re.sub(r"\s+LICENSE(?= \(|$)", "", name.strip().upper())
    return NAMES.get(short, short)


def refusals(packages: dict[str, Distribution | None]) -> list[str]:
    """Return a line for each dependency whose licence is neither on the allow-list nor reviewed."""
    lines = []
    for name, package in packages.items():
        if name in REVIEWED or NVIDIA.fullmatch(name):
            continue
        if package is None:
            lines.append(f"{name}: not installed, so its licence is not known")
        elif bad := licences(package) - ALLOWED:
            lines.append(f"{name} {package.version}: {', '.join(sorted(each or 'no licence named' for each in bad))}")
    return lines


def unknown_java_programs() -> list[str]:
    """Return a line for each Java program in pycocoevalcap that nobody has reviewed."""
    files = distribution("pycocoevalcap").files or []
    jars = {str(file.relative_to("pycocoevalcap")) for file in files if file.suffix == ".jar"}
    return [
        f"pycocoevalcap: {jar} was not reviewed"
        for jar in sorted(jars - set(JAVA_PROGRAMS))
        if not jar.startswith("spice/lib/")
    ]


def look_up_advisories() -> int:
    """Run pip-audit on the pinned versions. Return 1 if pip-audit fails or finds a vulnerability, otherwise 0.

    The result is also 0 if pip-audit is not installed or cannot connect to the advisory service.
    """
    if find_spec("pip_audit") is None:
        print("advisories: not checked, because pip-audit is not installed (pip install pip-audit)")
        return 0
    command = ["-m", "pip_audit", "--no-deps", "--disable-pip", "--format=json"]
    command += ["--requirement", str(ROOT / "constraints.txt")]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if "Max retries exceeded" in done.stderr or "ConnectionError" in done.stderr:
        print("advisories: not checked, because pip-audit cannot connect to the advisory service")
        return 0
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except ValueError:
        print(f"advisories: pip-audit failed\n{done.stderr}")
        return 1
    checked = [each for each in packages if "vulns" in each]
    print(
        f"advisories: {len(checked)} of {len(packages)} packages checked; the advisory service does not know the "
        "other packages"
    )
    found = [(each["name"], each["version"], fault["id"]) for each in checked for fault in each["vulns"]]
    for name, version, fault in found:
        print(f"  {name} {version}: {fault}")
    return 1 if found else 0


def main() -> int:
    """Print the result of the audit, and return the exit code."""
    packages = runtime_dependencies()
    refused = refusals(packages) + unknown_java_programs()
    print(f"licences: {len(packages)} dependencies, {len(refused)} refused")
    for line in refused:
        print(f"  {line}")
    return 1 if refused else look_up_advisories()


if __name__ == "__main__":
    sys.exit(main())
