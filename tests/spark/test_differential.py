"""Tests of ingest of random files, compared with naive readers: no row vanishes, and no text is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path

import pytest
from pyspark.sql import SparkSession
from random_files import RandomFile
from random_sources import SOURCES, draw_source

from pipelines.config import DataConfig
from pipelines.driver.ingest.run import ingest
from pipelines.platform import Platform

MIN_READ_SHARE = 0.95
"""Minimum share of the rows that become samples, among all rows that a naive reader can read."""


KINDS = [pytest.param(kind, marks=pytest.mark.matrix) if kind in ("folder", "table") else kind for kind in SOURCES]
"""Kinds of sources. Only `make faults` draws folders and tables, because other tests also compare their rows."""


@pytest.mark.parametrize("count", [4, pytest.param(80, marks=[pytest.mark.faults, pytest.mark.matrix])])
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_that_a_naive_reader_finds_is_ingested_or_reported(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path, kind: str, count: int
) -> None:
    drawn = draw_source(kind, tmp_path / "in", count, seed=21 + count)
    config = DataConfig.model_validate({"source": drawn.config, "near_duplicates": False})
    report = ingest(spark, platform, source, config)

    samples = spark.table(platform.table("samples")).where(f"source = '{source}'").select("source_row", "texts")
    texts = {row["source_row"]: [text["text"] for text in row["texts"]] for row in samples.collect()}
    refused = spark.table(platform.table("quarantine")).where(f"source = '{source}'").collect()
    rows = Counter(name.rpartition("#")[0] for name, said in texts.items() for _ in said)
    rows.update(row["source_row"].rpartition("#")[0] for row in refused)
    unreadable = {row["source_row"].rpartition("#")[0] for row in refused if row["reason"] == "unreadable_file"}
    named = unreadable | {Path(name).name for names in report.passed_over.values() for name in names}

    lost = [file.about for file in drawn.files if not accounted_for(file, rows[file.path.name], named)]
    assert lost == []
    expected = {row.text.strip() for file in drawn.files for row in file.rows or () if row.readable}
    found = {text for said in texts.values() for text in said}
    assert found <= drawn.texts, "a stored text differs from the texts of the input"
    assert len(expected & found) >= MIN_READ_SHARE * len(expected), sorted(expected - found)[:5]


def accounted_for(file: RandomFile, rows: int, named: Collection[str]) -> bool:
    """Return True if all rows of a file are in the tables, or if the file or its folder is reported as not read.

    Args:
        file: input file with random content.
        rows: number of rows that tables `samples` and `quarantine` contain from this file.
        named: names of the files and folders that were not read, according to the report or `quarantine`.
    """
    is_named = not {file.path.name, file.path.parent.name}.isdisjoint(named)
    return is_named or (file.rows is not None and rows == len(file.rows))
