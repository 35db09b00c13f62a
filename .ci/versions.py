"""Run tests with each supported version of Spark and Python, with mlflow-skinny, and with the oldest dependencies.

`make versions` runs this file, which creates one environment per row below .versions/. The exit code is 1 if an
environment cannot be installed or a test fails.

python .ci/versions.py [--tests FILE ...] [ROW ...]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".versions"
UV = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") or "uv"
"""Path of the program uv, which `make` installs beside Python, or the name `uv` if it is not found."""
SPARK_TESTS = ("tests/spark",)
"""Tests that use a Spark session. One of these tests runs a second ingest, which updates texts and pictures of the
first."""
TOOLS = ("hypothesis", "pytest<9.2", "pytest-timeout", "pytest-xdist")
SHOWN = ("pyspark", "delta-spark", "mlflow", "mlflow-skinny", "torch", "pyarrow", "pandas")


@dataclass(frozen=True)
class Row:
    """One environment and the tests that run in this environment.

    Attributes:
        name: name of the row, and of its environment.
        python: version of Python, which must be installed.
        packages: requirements that replace lines of constraints.txt.
        oldest: whether to install the oldest versions that pyproject.toml allows, instead of those of constraints.txt.
        skinny: whether to replace the distribution mlflow by mlflow-skinny, as in a Databricks ML runtime.
        tests: files and folders with the tests.
    """

    name: str
    python: str = "3.11"
    packages: tuple[str, ...] = ()
    oldest: bool = False
    skinny: bool = False
    tests: tuple[str, ...] = SPARK_TESTS


ROWS = (
    Row("spark-4.0.1", packages=("pyspark==4.0.1",)),
    Row("spark-4.1", packages=("pyspark==4.1.*",)),
    Row("spark-4.2.0", packages=("pyspark==4.2.0",)),
    Row("python-3.12", python="3.12"),
    Row("python-3.13", python="3.13"),
    # MLflow in a workspace is a server, so the tests of this row use a server and no database.
    Row("mlflow-skinny", skinny=True, tests=("tests/unit/jobs/test_preflight.py", "tests/unit/jobs/test_endpoint.py")),
    Row("oldest", oldest=True),
)


def main(arguments: list[str]) -> int:
    """Run the named rows, or all rows, and return the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", nargs="*", metavar="ROW", help="row to run; without a row, all rows run")
    parser.add_argument("--tests", action="append", metavar="FILE", help="test file to run instead of the row's tests")
    given = parser.parse_args(arguments)
    if unknown := set(given.rows) - {row.name for row in ROWS}:
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}; rows: {', '.join(row.name for row in ROWS)}")
    failed = []
    for row in ROWS:
        if given.rows and row.name not in given.rows:
            continue
        if given.tests:
            row = replace(row, tests=tuple(given.tests))
        start = time.monotonic()
        print(f"== {row.name}", flush=True)
        passed = install(row) and run_tests(row)
        print(
            f"== {row.name}: {'passed' if passed else 'FAILED'}, {(time.monotonic() - start) / 60:.1f} min", flush=True
        )
        if not passed:
            failed.append(row.name)
    print(f"failed rows: {', '.join(failed)}" if failed else "all rows passed")
    return 1 if failed else 0


def install(row: Row) -> bool:
    """Create the environment of a row. Return whether everything could be installed."""
    folder = FOLDER / row.name
    python = folder / "bin" / "python"
    constraints = folder / "constraints.txt"
    if not run(UV, "venv", "--quiet", "--clear", "--no-python-downloads", "--python", row.python, str(folder)):
        return False
    constraints.write_text("".join(f"{line}\n" for line in kept_constraints(row)))
    pip = (UV, "pip", "install", "--quiet", "--python", str(python))
    if row.oldest:
        # Two steps, because --resolution would also install the oldest releases of the test tools.
        return run(*pip, "--resolution", "lowest-direct", "-e", ".[local]") and run(*pip, *TOOLS)
    if not run(*pip, "-c", str(constraints), "-e", ".[local]", *TOOLS, *row.packages):
        return False
    if row.skinny:
        # Both distributions contain the module `mlflow`, so mlflow-skinny is installed again after mlflow is removed.
        uninstall = (UV, "pip", "uninstall", "--quiet", "--python", str(python), "mlflow")
        return run(*uninstall) and run(
            *pip, "-c", str(constraints), "--reinstall-package", "mlflow-skinny", "mlflow-skinny"
        )
    return True


def kept_constraints(row: Row) -> list[str]:
    """Return the lines of constraints.txt for the packages that the row does not replace."""
    replaced = {re.split(r"[=<>\[]", package)[0] for package in row.packages}
    if "pyspark" in replaced:
        replaced.add("py4j")  # each pyspark requires an exact version of py4j
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line.partition("==")[0] not in replaced]


def run_tests(row: Row) -> bool:
    """Print the installed versions and run the tests of a row. Return whether all tests passed."""
    python = FOLDER / row.name / "bin" / "python"
    subprocess.run([python, "-P", "-c", SHOW, *SHOWN], cwd=ROOT, check=True)
    return run(str(python), "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *row.tests)


SHOW = """
import sys
from importlib.metadata import distributions
found = {d.metadata["Name"].replace("_", "-"): d.version for d in distributions()}
shown = [f"{name} {found[name]}" for name in sys.argv[1:] if name in found]
print("python", sys.version.split()[0], *shown, flush=True)
"""
"""Program that prints the version of Python and the versions of the distributions in its arguments."""


def run(*command: str) -> bool:
    """Run a command in the root folder, and return whether it succeeded."""
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
