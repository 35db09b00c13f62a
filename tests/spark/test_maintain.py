"""Tests of the maintenance of Delta tables: small files are merged, old files are removed, no row or shard changes."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pictures import as_base64, png, write_csv
from py4j.protocol import Py4JJavaError  # type: ignore[import-untyped]
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from pipelines.config import DataConfig
from pipelines.driver.delta import maintain as maintenance
from pipelines.driver.delta.maintain import FULL_GROUP_BYTES, GROUP_BYTES, maintain, maintain_table
from pipelines.driver.delta.migrate import BACKUP, migrate, undo
from pipelines.driver.delta.tables import ensure_table, ensure_tables
from pipelines.driver.delta.versions import MAINTENANCE_OPERATIONS, read_versions
from pipelines.driver.ingest.run import ingest
from pipelines.driver.shard.run import shard
from pipelines.errors import UserError
from pipelines.formats.format_version import FILE, FORMAT, PROPERTY, read_home_format
from pipelines.formats.tables import DECISIONS, SAMPLES, TABLES
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


def test_maintain_refuses_a_retention_time_below_one_week(spark: SparkSession, platform: Platform) -> None:
    with pytest.raises(UserError, match=r"--retain-hours.*167.*at least 168"):
        maintain(spark, platform, retain_hours=167)


@pytest.mark.matrix
def test_optimize_of_a_clustered_table_leaves_full_groups_of_files_alone(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"delta.`{tmp_path}`"
    spark.sql(f"CREATE TABLE {name} (id BIGINT, source STRING) USING DELTA CLUSTER BY (source)")

    def append_files(count: int) -> None:
        for number in range(count):
            rows = spark.range(number, number + 1, 1, 1).selectExpr("id", "'a' AS source")
            rows.write.format("delta").mode("append").save(str(tmp_path))

    append_files(3)
    assert maintain_table(spark, name, {}, None).rewritten == 3
    append_files(2)
    assert maintain_table(spark, name, {}, None).rewritten == 3, "the first group of files is not full"
    monkeypatch.setattr(maintenance, "FULL_GROUP_BYTES", 1)
    append_files(2)
    done = maintain_table(spark, name, {}, None)
    assert (done.rewritten, done.files) == (2, 2)
    assert GROUP_BYTES >= FULL_GROUP_BYTES + 2**30, "a group of files of 1 GiB becomes full"


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


@pytest.fixture
def home(spark: SparkSession, platform: Platform, tmp_path: Path) -> Iterator[Platform]:
    """A second home folder for the same Spark session. The path of this home folder needs quotes in SQL."""
    root = tmp_path / "a home's `name`"
    other = dataclasses.replace(platform, namespace="second", root=root, tables=root / "warehouse")
    yield other
    spark.sql("DROP SCHEMA IF EXISTS second CASCADE")


def forget(spark: SparkSession, home: Platform) -> None:
    """Remove all tables from the in-memory catalog, as happens at the end of a command. The files remain."""
    for table in TABLES:
        spark.sql(f"DROP TABLE IF EXISTS {home.table(table.name)}")


def versions_of(spark: SparkSession, home: Platform) -> dict[str, int]:
    return {t.name: read_versions(spark, home, "any", t).newest for t in TABLES}


def test_a_table_of_a_newer_format_is_refused_and_a_new_table_has_the_format_of_this_release(
    spark: SparkSession, home: Platform
) -> None:
    spark.sql("CREATE SCHEMA second")
    assert ensure_table(spark, home, DECISIONS)
    name = home.table(DECISIONS.name)
    properties = {row["key"]: row["value"] for row in spark.sql(f"SHOW TBLPROPERTIES {name}").collect()}
    assert properties[PROPERTY] == str(FORMAT)
    spark.sql(f"ALTER TABLE {name} SET TBLPROPERTIES ('{PROPERTY}' = '{FORMAT + 1}')")
    forget(spark, home)
    with pytest.raises(
        UserError, match=rf"a newer release .*format {FORMAT + 1}; this release reads .* up to {FORMAT}"
    ):
        ensure_table(spark, home, DECISIONS)


@pytest.mark.faults
@pytest.mark.matrix
def test_a_table_migration_changes_no_row_and_no_dataset_version_and_can_be_undone(
    spark: SparkSession, home: Platform, source: str, tmp_path: Path
) -> None:
    write_csv(tmp_path / "rows.csv", [[as_base64(png(7100 + n)), f"picture {n}"] for n in range(4)])
    data = DataConfig.model_validate({"source": {"path": str(tmp_path / "rows.csv")}, "near_duplicates": False})
    ingest(spark, home, source, data)
    samples = home.table(SAMPLES.name)
    for table in TABLES:  # as in tables that Lakesight 0.1.0 created
        spark.sql(f"ALTER TABLE {home.table(table.name)} UNSET TBLPROPERTIES ('{PROPERTY}')")
    spark.sql(f"ALTER TABLE {samples} DROP CONSTRAINT usable")
    (home.root / FILE).unlink()
    shards = shard(spark, home, source, data, ImageConfig(size=8), "train")
    before, rows, pinned = versions_of(spark, home), spark.table(samples).collect(), read_versions(spark, home, source)
    forget(spark, home)

    plan = migrate(spark, home, dry_run=True)
    assert [table.format for table in plan.tables] == [0] * len(TABLES)
    assert ["ADD CONSTRAINT usable" in statement for statement in plan.tables[0].statements] == [True, False]
    assert not (home.root / BACKUP).exists()
    ensure_tables(spark, home)
    assert versions_of(spark, home) == before
    done = migrate(spark, home, dry_run=False)
    assert [table.statements for table in done.tables] == [table.statements for table in plan.tables]
    assert read_home_format(home.root) == FORMAT
    assert migrate(spark, home, dry_run=False).tables[0].statements == ()
    assert spark.table(samples).collect() == rows
    assert read_versions(spark, home, source).last_change == pinned.last_change
    assert shard(spark, home, source, data, ImageConfig(size=8), "train").reused
    assert ingest(spark, home, source, data).rows_in == 0

    assert [table.format for table in undo(spark, home).tables] == [FORMAT] * len(TABLES)
    assert read_home_format(home.root) == 0
    properties = {row["key"] for row in spark.sql(f"SHOW TBLPROPERTIES {samples}").collect()}
    assert not {PROPERTY, "delta.constraints.usable"} & properties
    assert spark.table(samples).collect() == rows
    again = shard(spark, home, source, data, ImageConfig(size=8), "train")
    assert (again.reused, again.folder) == (True, shards.folder)
    assert ingest(spark, home, source, data).rows_in == 0, "undoing a migration loses no row"
    with pytest.raises(UserError, match="there is no migration to undo"):
        undo(spark, home)

    migrate(spark, home, dry_run=False)
    spark.sql(f"DELETE FROM {samples} WHERE source = '{source}'")
    with pytest.raises(
        UserError, match=r"cannot be undone, because rows were written after the migration.*DELETE at version"
    ):
        undo(spark, home)
    assert read_home_format(home.root) == FORMAT
