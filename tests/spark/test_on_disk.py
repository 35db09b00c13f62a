"""Tests that a laptop reads tables without slow Spark queries, and gets the same results as with Spark."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pictures import as_base64, png, write_csv
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from spark_session import executed_queries

from pipelines.config import DataConfig
from pipelines.driver.delta.retry import WriteConflict
from pipelines.driver.delta.tables import table_id
from pipelines.driver.delta.versions import read_versions
from pipelines.driver.ingest.ledger import hash_rules, read_ledger
from pipelines.driver.ingest.run import ingest
from pipelines.driver.ingest.table_rows import Stamp, count_rows, verify_append
from pipelines.formats.tables import QUARANTINE, SAMPLES
from pipelines.platform import Platform


def data_of(path: Path, *rows: list[str]) -> DataConfig:
    split = {"kind": "hash", "val": 0.3, "test": 0.3}
    return DataConfig.model_validate({"source": {"path": str(write_csv(path, list(rows)))}, "split": split})


def test_table_versions_row_counts_and_the_ledger_are_the_same_with_and_without_spark(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    rows = [[as_base64(png(shade)), f"picture {shade}"] for shade in range(100, 106)]
    data = data_of(tmp_path / "a.csv", *rows, ["no picture", "bad"])
    report = ingest(spark, platform, source, data)
    workspace = replace(platform, tables=None)  # without a table folder, Spark reads every table

    for table in (SAMPLES, QUARANTINE):
        found = [read_versions(spark, place, source, table) for place in (platform, workspace)]
        assert found[0][:2] == found[1][:2]
        assert all(version.commit for version in found)
        assert table_id(spark, platform, table) == table_id(spark, workspace, table)
    of_source: dict[str, str | datetime] = {"source": source}
    for column in ("split", "source_row", "image_id"):
        counts = [count_rows(spark, place, SAMPLES, of_source, by=column) for place in (platform, workspace)]
        assert counts[0] == counts[1]
        assert sum(counts[0].values()) == 6
    assert count_rows(spark, platform, SAMPLES, of_source, by="split") == report.splits
    ledgers = [read_ledger(spark, place, source, hash_rules(data)) for place in (platform, workspace)]
    assert ledgers[0].to_pylist() == ledgers[1].to_pylist() != []
    assert read_ledger(spark, platform, source, "other rules").num_rows == 0


@pytest.mark.parametrize("in_workspace", [False, True])
def test_an_append_that_stored_fewer_rows_than_expected_raises_a_write_conflict(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path, in_workspace: bool
) -> None:
    report = ingest(spark, platform, source, data_of(tmp_path / "a.csv", [as_base64(png(107)), "a"]))
    rows = spark.table(platform.table(SAMPLES.name)).filter(F.col("source") == source)
    time = rows.select(F.unix_micros("ingested_at").alias("time")).collect()[0]["time"]
    written = datetime.fromtimestamp(time // 10**6, UTC).replace(microsecond=time % 10**6)
    stamp = Stamp(source, report.ingest_id, written, report.dataset_version)
    place = replace(platform, tables=None) if in_workspace else platform
    verify_append(spark, place, SAMPLES, stamp, 1)
    with pytest.raises(WriteConflict, match="has 1 rows of this ingest, expected 2"):
        verify_append(spark, place, SAMPLES, stamp, 2)
    with pytest.raises(WriteConflict, match="has 0 rows of this ingest, expected 1"):
        verify_append(spark, place, SAMPLES, replace(stamp, planned_at=datetime.now(UTC)), 1)


def test_a_small_ingest_of_a_new_source_runs_only_a_few_spark_queries(
    spark: SparkSession, platform: Platform, source: str, tmp_path: Path
) -> None:
    first, second = (data_of(tmp_path / f"{n}.csv", [as_base64(png(110 + n)), "a"]) for n in range(2))
    ingest(spark, platform, source, first)  # the first ingest also opens the tables in the Spark session
    before = executed_queries(spark)
    ingest(spark, platform, f"{source}-other", second)
    assert executed_queries(spark) - before <= 14
