"""Tests that docs/reference.md lists what the code defines."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from jobs.cli import COMMANDS
from pipelines.formats.tables import TABLES

REFERENCE = runpy.run_path(str(Path(__file__).parents[2] / ".ci" / "reference.py"), run_name="reference")


@pytest.fixture(scope="module")
def rendered() -> str:
    text: str = REFERENCE["render"]()
    return text


def test_the_reference_page_is_what_the_code_defines(rendered: str) -> None:
    assert REFERENCE["PAGE"].read_text(encoding="utf-8") == rendered, "run: python .ci/reference.py"


def test_the_reference_lists_every_command_and_column_and_explains_every_key(rendered: str) -> None:
    titles = set(re.findall(r"^### (.*)$", rendered, re.M))
    assert {f"lakesight {name}" for name in COMMANDS} | {f"Table {table.name}" for table in TABLES} <= titles
    assert [column for table in TABLES for column in table.names if f"| `{column}` |" not in rendered] == []
    assert re.findall(r"^\|.*\| +\|$", rendered, re.M) == [], "a key or column without a meaning"
    assert "| `steps` | integer (> 0) |" in rendered
