"""Tests that the exports on the page docs/nightly.md select the captions of one table of one model."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from deltalake import DeltaTable
from local_platforms import open_local
from written_rows import write_rows

from jobs.table_files import table_relation
from pipelines.formats.tables import GENERATED_CAPTIONS

PAGE = (Path(__file__).parents[3] / "docs" / "nightly.md").read_text(encoding="utf-8")


def conditions() -> dict[str, str]:
    """Return the shell words that are the conditions of the exports in the script and in the DAG."""
    [script] = re.findall(r"^  of_table=(.+)$", PAGE, re.M)
    [dag] = re.findall(r"^OF_TABLE = (.+)$", PAGE, re.M)
    return {"nightly.sh": script, "captions_dag.py": f'"{ast.literal_eval(dag)}"'}


@pytest.mark.parametrize("file", ["nightly.sh", "captions_dag.py"])
def test_the_export_selects_the_captions_of_the_table_and_of_no_table_with_a_similar_name(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = open_local(monkeypatch, tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    tables = ("shop/products", "shop/products_archive", "old/shop/products", "shop/products/2025", "shop/product")
    for model in ("birds", "coast"):
        rows = [{"source_table": platform.resolve_table(table), "model_name": model} for table in tables]
        write_rows(tmp_path, GENERATED_CAPTIONS, *rows)
    (tmp_path / "link").symlink_to(tmp_path)
    printed = ["sh", "-c", f"cd {shlex.quote(str(tmp_path / 'link'))} && printf %s {conditions()[file]}"]
    where = subprocess.run(printed, capture_output=True, text=True, check=True).stdout
    captions = table_relation(DeltaTable(tmp_path / GENERATED_CAPTIONS.name))
    found = captions.select(["source_table", "model_name"], where, "", None).read_all().to_pylist()
    assert found == [{"source_table": f"delta.`{tmp_path}/shop/products`", "model_name": "birds"}]
