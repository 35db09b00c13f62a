"""Tests of the rows that an ingest reads after rows of its source table were updated or deleted."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from pyspark.sql import DataFrame, SparkSession

from pipelines.config import DataConfig
from pipelines.driver.ingest.ledger import items_table
from pipelines.driver.ingest.sources.open import open_source
from pipelines.driver.ingest.sources.source import Source
from pipelines.formats.delta_files import commit_id
from pipelines.platform import Platform

FEED = {"delta.enableChangeDataFeed": "true"}


def table_rows(numbers: list[int], seed: int = 0) -> pa.Table:
    """Return rows whose columns have the names that the join of the change data feed uses, too."""
    drawn = random.Random(seed)
    rows = [{"id": n, "image": drawn.randbytes(100), "text": f"text {n}", "row": row} for row, n in enumerate(numbers)]
    return pa.Table.from_pylist([row | {"key": 1, "version": 2, "image_id": "x"} for row in rows])


def open_after(spark: SparkSession, platform: Platform, path: Path, version: int, **source: Any) -> Source:
    """Open a table as an ingest does whose last ingest has read a version of the table."""
    config = DataConfig.model_validate(
        {"source": {"kind": "table", "path": str(path), "columns": {"id": "id"}} | source}
    )
    ingested = items_table([(str(DeltaTable(path).metadata().id), f"version {version} {commit_id(path, version)}")])
    return open_source(spark, platform, "birds", config, ingested)


def rows_to_read(source: Source) -> DataFrame:
    assert source.rows is not None
    return source.rows.frame


def read(source: Source) -> Counter[tuple[int, str]]:
    """Count the rows to read by their id and text."""
    return Counter((row["used_2"], row["used_1"]) for row in rows_to_read(source).select("used_1", "used_2").collect())


def scans_pictures(source: Source) -> bool:
    """Return whether the rows to read need pictures from the data files of the table, according to Spark's plan."""
    plan = rows_to_read(source)._jdf.queryExecution().executedPlan().toString()
    return bool(re.search(r"FileScan parquet .*\bimage#", plan))


def test_only_the_pictures_of_changed_rows_are_read_if_no_other_row_has_their_ids(
    spark: SparkSession, platform: Platform, tmp_path: Path
) -> None:
    write_deltalake(tmp_path, table_rows(list(range(200))), configuration=FEED)
    table = DeltaTable(tmp_path)
    table.update(updates={"text": "'first'"}, predicate="id = 7")
    table.delete("id = 8")
    table.update(updates={"text": "'second'"}, predicate="id = 7")
    opened = open_after(spark, platform, tmp_path, 0)
    assert read(opened) == Counter({(7, "second"): 1})
    assert not scans_pictures(opened)
    write_deltalake(tmp_path, table_rows([7]), mode="append")
    table.update_incremental()
    table.update(updates={"text": "'third'"}, predicate="id = 7 AND text = 'second'")
    both = open_after(spark, platform, tmp_path, 4)
    assert read(both) == Counter({(7, "text 7"): 1, (7, "third"): 1})
    assert scans_pictures(both), "the feed since version 4 lacks one of the rows with this id"


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.matrix) for seed in range(2, 8))])
def test_the_rows_to_read_are_all_current_rows_of_each_updated_or_deleted_id(
    spark: SparkSession, platform: Platform, tmp_path: Path, seed: int
) -> None:
    drawn = random.Random(seed)
    write_deltalake(tmp_path, table_rows([1, 2, 2, 3, 4, 5, 5, 6]), configuration=FEED)
    touched: set[int] = set()
    for step in range(8):
        table, key = DeltaTable(tmp_path), drawn.randint(1, 8)
        conditions = [f"id = {key}", f"id = {key} AND row % 2 = 0", f"id = {key} AND row % 2 = 1"]
        action, condition = drawn.choice(["insert", "update", "update", "delete", "compact"]), drawn.choice(conditions)
        if action == "insert":
            write_deltalake(tmp_path, table_rows([key]), mode="append")
        elif action == "compact":
            table.optimize.compact()
        elif action == "update":
            done = table.update(updates={"text": f"'update {step}'"}, predicate=condition)
            touched |= {key} if done["num_updated_rows"] else set()
        else:
            touched |= {key} if table.delete(condition)["num_deleted_rows"] else set()
    assert touched
    found = read(open_after(spark, platform, tmp_path, 0, filter="text != 'update 1'"))
    rows = DeltaTable(tmp_path).to_pyarrow_table(columns=["id", "text"]).to_pylist()
    current = Counter((row["id"], row["text"]) for row in rows if row["text"] != "update 1")

    def of_touched(counts: Counter[tuple[int, str]]) -> dict[tuple[int, str], int]:
        return {row: count for row, count in counts.items() if row[0] in touched}

    assert of_touched(found) == of_touched(current)
    assert found <= current, "other ids have new rows only"
