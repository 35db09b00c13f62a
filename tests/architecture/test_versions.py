"""Tests of `make versions`: the command fails if an environment is unknown or its Python is not installed.

The environments include the oldest and the newest allowed PySpark and the oldest allowed Python.
"""

from __future__ import annotations

import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
VERSIONS: dict[str, Any] = runpy.run_path(str(ROOT / ".ci" / "versions.py"))
ROWS = {row.name: row for row in VERSIONS["ROWS"]}


def test_the_rows_cover_the_oldest_and_newest_pyspark_and_the_oldest_python_that_the_project_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pyspark,) = [need for need in project["optional-dependencies"]["local"] if Requirement(need).name == "pyspark"]
    ends = {each.version for each in Requirement(pyspark).specifier}
    exact = {package.partition("==")[2] for row in ROWS.values() for package in row.packages}
    assert ends <= exact
    assert project["requires-python"].removeprefix(">=") in {row.python for row in ROWS.values()}


def test_a_row_keeps_all_constraints_except_those_of_its_own_packages() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    dropped = set(lines) - set(VERSIONS["kept_constraints"](ROWS["spark-4.0.1"]))
    assert {line.partition("==")[0] for line in dropped} == {"pyspark", "py4j"}
    assert VERSIONS["kept_constraints"](ROWS["python-3.12"]) == lines


def test_the_command_fails_if_a_row_is_unknown_or_its_python_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        VERSIONS["main"](["spark-9"])
    variables = VERSIONS["main"].__globals__
    monkeypatch.setitem(variables, "FOLDER", tmp_path)
    monkeypatch.setitem(variables, "ROWS", (VERSIONS["Row"]("future", python="3.99"),))
    assert VERSIONS["main"]([]) == 1
