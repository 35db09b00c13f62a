"""Tests that the notebooks run without changes, and that the walk-through has the format of a Databricks notebook."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from pyspark.sql import SparkSession, functions

from jobs.pipeline import held_out
from pipelines.platform import Platform

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
NOTEBOOK = NOTEBOOKS / "walkthrough.py"
SHOWN_TABLE = re.compile(r"^\+[-+]+\n\|.*\n\+[-+]+\n((?:\|.*\n)+)\+[-+]+$", re.M)
"""Regular expression for a table that Spark prints. The group matches the rows of the table (at least one row)."""


def test_the_walkthrough_has_the_format_of_a_databricks_notebook() -> None:
    source = NOTEBOOK.read_text()
    assert source.startswith("# Databricks notebook source\n")
    cells = source.split("\n# COMMAND ----------\n")
    assert len(cells) > 10
    assert not re.search(r"^\s*(def|class) ", source, re.M), "the notebook calls the packages and defines nothing"


@pytest.mark.matrix
def test_the_walkthrough_runs_from_pictures_to_captions(
    platform: Platform, spark: SparkSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAKESIGHT_HOME", str(platform.root))
    ran = runpy.run_path(str(NOTEBOOK))
    ingested, captioned = ran["ingested"], ran["captioned"]
    assert ingested.new + ingested.merged + ingested.duplicates + ingested.quarantined == ingested.rows_in == 300
    assert ran["result"].status == "ok"
    assert ran["evaluation"].gallery.exists()
    assert captioned.captioned == captioned.considered > 0
    assert "generated" in capsys.readouterr().out


@pytest.mark.matrix
@pytest.mark.timeout(1200)
def test_the_notebooks_for_a_workspace_run_in_order_and_show_a_table_with_rows(
    platform: Platform, spark: SparkSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAKESIGHT_HOME", str(platform.root))
    monkeypatch.syspath_prepend(NOTEBOOKS / "workspace")
    ran = {}
    notebooks = sorted((NOTEBOOKS / "workspace").glob("[0-9]*.py"))
    for path in notebooks:
        ran = runpy.run_path(str(path))
        shown = capsys.readouterr().out
        assert path.stem == "00_setup" or SHOWN_TABLE.findall(shown), path.name
    assert ran["again"].nothing_new
    assert (ran["trained"].trained, ran["promoted"].already) == (False, True)

    # A human text is shown only beside the captions of its own picture: not beside the caption of an earlier picture
    # with the same id, nor beside a caption of another table.
    captions = (
        spark.table(platform.table("generated_captions")).where(f"model_name = '{ran['job'].model_name}'").limit(1)
    )
    earlier = captions.withColumns({"sha256": functions.lit("0" * 64), "image_column": functions.lit("earlier")})
    elsewhere = captions.withColumn("source_table", functions.lit("shop.products"))
    earlier.union(elsewhere).writeTo(platform.table("generated_captions")).append()
    ran = runpy.run_path(str(notebooks[5]))
    # Other tests may have captioned further pictures with this model version.
    assert ran["both"].where(held_out(ran["job"])).count() == ran["captioned"].considered > 0
