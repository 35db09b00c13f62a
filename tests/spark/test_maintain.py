"""Maintenance of Delta tables: small files are merged, old files are removed, and all rows and shards stay the same."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from pictures import as_base64, png, write_csv
from py4j.protocol import Py4JJavaError  # type: ignore[import-untyped]
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from pipelines.config import DataConfig
from pipelines.driver.delta.maintain import maintain
from pipelines.driver.delta.versions import MAINTENANCE_OPERATIONS
from pipelines.driver.ingest.run import ingest
from pipelines.driver.shard import shard
from pipelines.errors import UserError
from pipelines.formats.tables import SAMPLES, TABLES
from pipelines.platform import Platform
from vlm.config import ImageConfig


@pytest.mark.faults
@pytest.mark.matrix
def test_maintenance_removes_old_files_without_changing_a_row_or_a_shard(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    rows = [[as_base64(png(7000 + n)), f"picture {n}"] for n in range(12)]
    data = DataConfig.model_validate({"source": {"path": str(tmp_path)}, "near_duplicates": False})
    for number in range(2):
        write_csv(tmp_path / f"{number}.csv", rows[number * 6 : number * 6 + 6])
        ingest(spark, platform, source, data)
    first = shard(spark, platform, source, data, ImageConfig(size=8), "train")
    table = platform.table(SAMPLES.name)
    spark.sql(f"ALTER TABLE {table} DROP CONSTRAINT usable")
    before = spark.table(table).where(f"source = '{source}'").orderBy("image_id").collect()
    newest = spark.sql(f"DESCRIBE HISTORY {table} LIMIT 1").collect()[0]["version"]
    assert platform.tables is not None
    orphan = platform.tables / SAMPLES.name / "part-00000-of-a-job-that-was-killed.parquet"
    orphan.write_bytes(b"half a file")
    os.utime(orphan, (time.time() - 8 * 86400,) * 2)

    report = maintain(spark, platform)
    assert [done.table for done in report.tables] == [platform.table(table.name) for table in TABLES]
    assert [done.postponed for done in report.tables] == [None] * len(TABLES)
    samples = report.tables[0]
    assert samples.checks_added == ("usable",)
    assert samples.rewritten > samples.written > 0
    assert (samples.removed, orphan.exists()) == (1, False)
    assert spark.table(table).where(f"source = '{source}'").orderBy("image_id").collect() == before
    history = spark.sql(f"DESCRIBE HISTORY {table}").where(f"version > {newest}").collect()
    assert {commit["operation"] for commit in history} <= MAINTENANCE_OPERATIONS
    again = shard(spark, platform, source, data, ImageConfig(size=8), "train")
    assert (again.reused, again.folder) == (True, first.folder)


def test_a_retention_time_below_one_week_is_refused(spark: SparkSession, platform: Platform) -> None:
    with pytest.raises(UserError, match=r"--retain-hours.*167.*at least 168"):
        maintain(spark, platform, retain_hours=167)


def test_delta_constraints_refuse_rows_without_a_text_or_with_an_unknown_split(
    spark: SparkSession, platform: Platform
) -> None:
    texts = "array(named_struct('prompt', '', 'text', 'a'))"
    for wrong in (f"8 AS width, {texts} AS texts, 'tset' AS split", "8 AS width, array() AS texts, 'test' AS split"):
        values = f"'a' AS image_id, repeat('0', 64) AS sha256, X'00' AS image, 'PNG' AS format, 8 AS height, {wrong}"
        rest = "'s' AS source, 'r' AS source_row, 'i' AS ingest_id, now() AS ingested_at"
        with pytest.raises((Py4JJavaError, PySparkException), match="usable"):
            spark.sql(f"SELECT {values}, {rest}").write.format("delta").mode("append").saveAsTable(
                platform.table(SAMPLES.name)
            )


def test_tables_are_created_with_their_comments_clustering_columns_and_properties(
    spark: SparkSession, platform: Platform
) -> None:
    detail = spark.sql(f"DESCRIBE DETAIL {platform.table(SAMPLES.name)}").collect()[0]
    assert detail["description"] == SAMPLES.comment
    assert detail["clusteringColumns"] == list(SAMPLES.cluster_by)
    assert detail["properties"]["delta.enableDeletionVectors"] == "false"
    columns = spark.sql(f"DESCRIBE TABLE {platform.table(SAMPLES.name)}").collect()
    assert {column.name: column.comment for column in SAMPLES.columns}.items() <= {
        row["col_name"]: row["comment"] for row in columns
    }.items()
