"""Tests of changes that other programs make to rows and tables between two stages: no row is lost or repeated."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from caption_job import ROWS, caption_table, prepare
from deltalake import DeltaTable
from pictures import as_base64, png, write_csv
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from pipelines.config import DataConfig
from pipelines.driver.ingest.run import ingest
from pipelines.driver.shard.run import shard
from pipelines.errors import UserError
from pipelines.formats.tables import TABLES
from pipelines.platform import Platform
from vlm.config import ImageConfig

pytestmark = [pytest.mark.faults, pytest.mark.matrix]


@pytest.fixture
def home(spark: SparkSession, platform: Platform, tmp_path: Path) -> Iterator[Platform]:
    """A second home folder, with separate tables in the Spark session that all tests share."""
    other = replace(platform, namespace="outside", root=tmp_path / "home", tables=tmp_path / "home" / "warehouse")
    yield other
    spark.sql("DROP SCHEMA IF EXISTS outside CASCADE")


def data(folder: Path) -> DataConfig:
    split = {"kind": "hash", "val": 0, "test": 0}
    return DataConfig.model_validate({"source": {"path": str(folder)}, "near_duplicates": False, "split": split})


def add_rows(folder: Path, first: int, count: int = 6) -> None:
    folder.mkdir(exist_ok=True)
    rows = [[as_base64(png(n)), f"picture {n}"] for n in range(first, first + count)] + [["?", "bad"]]
    write_csv(folder / f"{first}.csv", rows)


def read(home: Platform, table: str) -> list[dict[str, Any]]:
    assert home.tables is not None
    rows: list[dict[str, Any]] = DeltaTable(home.tables / table).to_pyarrow_table().to_pylist()
    return rows


def test_the_next_shards_and_captions_include_rows_that_other_programs_added_and_omit_deleted_rows(
    spark: SparkSession, home: Platform, source: str, tmp_path: Path
) -> None:
    pictures = tmp_path / "pictures"
    add_rows(pictures, 1)
    ingest(spark, home, source, data(pictures))
    first = shard(spark, home, source, data(pictures), ImageConfig(size=8), "train")
    [copied, deleted, *_] = read(home, "samples")
    samples = home.table("samples")
    spark.sql(f"DELETE FROM {samples} WHERE image_id = '{deleted['image_id']}'")
    fewer = shard(spark, home, source, data(pictures), ImageConfig(size=8), "train")
    assert (first.num_rows, fewer.num_rows, fewer.reused) == (6, 5, False)
    assert ingest(spark, home, source, data(pictures)).rows_in == 0  # a row that somebody deleted stays deleted
    copy = spark.table(samples).where(F.col("image_id") == copied["image_id"]).withColumn("image_id", F.lit("x/1"))
    copy.writeTo(samples).append()
    assert shard(spark, home, source, data(pictures), ImageConfig(size=8), "train").num_rows == 6

    prepare(tmp_path)
    caption_table(spark, home, tmp_path, "1")
    spark.sql(f"DELETE FROM {home.table('generated_captions')} WHERE image_id IN ('00', '01')")
    again = caption_table(spark, home, tmp_path, "1")
    assert (again.captioned, again.already) == (2, ROWS - 2)


def test_a_table_column_that_another_program_added_is_kept_in_old_rows_and_null_in_new_rows(
    spark: SparkSession, home: Platform, source: str, tmp_path: Path
) -> None:
    pictures = tmp_path / "pictures"
    add_rows(pictures, 1)
    ingest(spark, home, source, data(pictures))
    spark.sql(f"ALTER TABLE {home.table('samples')} ADD COLUMN note STRING")
    spark.sql(f"UPDATE {home.table('samples')} SET note = 'kept'")
    write_csv(pictures / "more.csv", [[as_base64(png(1)), "another text"], [as_base64(png(90)), "new"]])
    report = ingest(spark, home, source, data(pictures))
    assert (report.new, report.merged) == (1, 1)
    notes = {len(row["texts"]): row["note"] for row in read(home, "samples") if row["note"] is None}
    assert notes == {1: None}
    assert max(len(row["texts"]) for row in read(home, "samples") if row["note"] == "kept") == 2


def test_after_a_table_was_dropped_shard_names_ingest_and_the_next_ingest_reads_all_pictures_again(
    spark: SparkSession, home: Platform, source: str, tmp_path: Path
) -> None:
    pictures = tmp_path / "pictures"
    add_rows(pictures, 1)
    ingest(spark, home, source, data(pictures))
    assert home.tables is not None
    shutil.rmtree(home.tables / "samples")
    for table in TABLES:  # a new command starts with an empty catalog
        spark.sql(f"DROP TABLE IF EXISTS {home.table(table.name)}")
    with pytest.raises(UserError, match="lakesight ingest"):
        shard(spark, home, source, data(pictures), ImageConfig(size=8), "train")
    assert ingest(spark, home, source, data(pictures)).new == 6
    assert shard(spark, home, source, data(pictures), ImageConfig(size=8), "train").num_rows == 6
