"""Tests of rows and files whose times are in the future, because a clock was wrong.

Rows that are written later still count as newer.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from caption_job import BAD, ROWS, caption_table, prepare
from deltalake import DeltaTable, write_deltalake
from pictures import png
from pyspark.sql import SparkSession

from pipelines.config import DataConfig
from pipelines.driver.delta.tables import ensure_table
from pipelines.driver.ingest.run import ingest
from pipelines.formats.tables import GENERATED_CAPTIONS, INGESTED, SAMPLES
from pipelines.platform import Platform

pytestmark = [pytest.mark.faults, pytest.mark.matrix]

YEAR = 365 * 86_400


def rows(number: int) -> pa.Table:
    return pa.Table.from_pylist([{"id": number, "image": png(number), "text": f"x{number}"}])


def test_a_caption_with_a_time_in_the_future_is_replaced_when_its_picture_changes(
    spark: SparkSession, platform: Platform, tmp_path: Path
) -> None:
    prepare(tmp_path)
    caption_table(spark, platform, tmp_path, "1")
    captions = platform.table(GENERATED_CAPTIONS.name)
    of_model = f"model_name = 'm-{tmp_path.name}'"
    spark.sql(f"UPDATE {captions} SET captioned_at = captioned_at + INTERVAL 1 YEAR WHERE {of_model}")
    DeltaTable(tmp_path / "photos").update({"photo": f"X'{png(200).hex()}'"}, predicate=f"id IN ('00', '{ROWS - 1}')")
    changed = caption_table(spark, platform, tmp_path, "1")
    assert (changed.captioned, changed.changed) == (2, 2)
    rows = {row["image_id"]: row for row in spark.table(captions).where(of_model).collect()}
    assert rows["00"]["sha256"] == rows[f"{ROWS - 1}"]["sha256"]
    assert sum(row["error"] is not None for row in rows.values()) == BAD - 1
    assert sorted(rows, key=lambda name: (rows[name]["captioned_at"], name))[-2:] == ["00", f"{ROWS - 1}"]
    again = caption_table(spark, platform, tmp_path, "1")
    assert (again.considered, again.already) == (ROWS, ROWS)


def test_a_table_ingest_continues_from_the_latest_ingest_even_if_an_earlier_ingest_has_a_time_in_the_future(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    write_deltalake(tmp_path, rows(1))
    write_deltalake(tmp_path, rows(2), mode="append")
    kind = {"kind": "table", "path": str(tmp_path), "columns": {"id": "id"}}
    newest = DataConfig.model_validate({"source": kind, "near_duplicates": False})
    pinned = newest.model_copy(update={"source": newest.source.model_copy(update={"version": 0})})
    assert ingest(spark, platform, source, newest).new == 2
    ledger = platform.table(INGESTED.name)
    spark.sql(f"UPDATE {ledger} SET ingested_at = ingested_at + INTERVAL 1 YEAR WHERE source = '{source}'")
    assert ingest(spark, platform, source, pinned).removed == 1
    assert ingest(spark, platform, source, newest).new == 1
    assert ingest(spark, platform, source, newest).rows_in == 0


@pytest.mark.timeout(60)
def test_an_unchanged_log_folder_without_a_commit_is_replaced_even_if_its_time_is_in_the_future(
    spark: SparkSession, platform: Platform, tmp_path: Path
) -> None:
    spark.sql(f"CREATE SCHEMA lakesight_clock LOCATION '{tmp_path}'")
    log = tmp_path / "samples" / "_delta_log"
    log.mkdir(parents=True)
    later = log.stat().st_mtime + YEAR
    os.utime(log, (later, later))
    ensure_table(spark, replace(platform, namespace="lakesight_clock", tables=tmp_path), SAMPLES)
    assert spark.table("lakesight_clock.samples").columns == SAMPLES.names
