"""Tests that the walk-through notebook runs without changes and has the format of a Databricks notebook."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from pipelines.platform import Platform

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "walkthrough.py"


def test_the_walkthrough_has_the_format_of_a_databricks_notebook() -> None:
    source = NOTEBOOK.read_text()
    assert source.startswith("# Databricks notebook source\n")
    cells = source.split("\n# COMMAND ----------\n")
    assert len(cells) > 10
    assert not re.search(r"^\s*(def|class) ", source, re.M), "the notebook calls the packages and defines nothing"


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
