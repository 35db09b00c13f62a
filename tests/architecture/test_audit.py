"""Tests that every runtime dependency has a licence that was allowed or reviewed (`make audit`)."""

from __future__ import annotations

import runpy
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

AUDIT = runpy.run_path(str(Path(__file__).parents[2] / ".ci" / "audit.py"), run_name="audit")


def package(folder: Path, metadata: str) -> PathDistribution:
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.4\nName: some\nVersion: 1\n{metadata}\n", encoding="utf-8")
    return PathDistribution(folder)


def test_every_runtime_dependency_is_installed_and_has_an_allowed_or_reviewed_licence() -> None:
    found = AUDIT["runtime_dependencies"]()
    assert {"mlflow", "torch", "psycopg", "sqlalchemy", "pycocoevalcap"} <= set(found)
    assert AUDIT["refusals"](found) == []
    assert AUDIT["unknown_java_programs"]() == []


@pytest.mark.parametrize(
    ("metadata", "allowed"),
    [
        ("License-Expression: MIT", True),
        ("License-Expression: GPL-3.0-only OR Apache-2.0", True),
        ("License-Expression: MIT AND (GPL-3.0-only)", False),
        ("License: BSD 3-Clause License\n  Copyright (c) somebody", True),
        ("Classifier: License :: OSI Approved :: MIT License", True),
        ("Classifier: License :: OSI Approved :: GNU General Public License v3 (GPLv3)", False),
        ("License: UNKNOWN", False),
        ("", False),
    ],
)
def test_a_licence_that_is_not_on_the_allow_list_is_refused(tmp_path: Path, metadata: str, allowed: bool) -> None:
    refused = AUDIT["refusals"]({"some": package(tmp_path / "some.dist-info", metadata), "missing": None})
    assert ("missing: not installed, so its licence is not known") in refused
    assert (len(refused) == 1) is allowed
