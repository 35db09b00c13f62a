"""Tests that an ingest or a caption job for few rows does no more work if there are more known rows or files.

The tests count shuffled rows, shuffled bytes, partitions and rows on the driver, never seconds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import write_deltalake
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from spark_session import count_shuffled_bytes, count_shuffled_rows

from pipelines.config import DataConfig
from pipelines.driver.caption.source_table import open_source_table
from pipelines.driver.caption.uncaptioned_rows import find_uncaptioned_rows
from pipelines.driver.delta.near_pairs import find_candidates, find_pairs, shared_keys
from pipelines.driver.delta.settings import spark_settings
from pipelines.driver.ingest.ledger import items_table
from pipelines.driver.ingest.quarantine import lost_rows
from pipelines.driver.ingest.run import stored_again
from pipelines.driver.ingest.sources import folder
from pipelines.driver.ingest.sources.files import MIN_TASKS
from pipelines.driver.ingest.sources.open import open_source
from pipelines.driver.ingest.table_rows import rows_to_add, rows_with_keys_of
from pipelines.executor.ingest.fingerprint import FINGERPRINT_BYTES
from pipelines.platform import Platform

KNOWN = (200, 800)
"""Two numbers of known rows. The work of an ingest must be the same for both numbers."""


@pytest.fixture(autouse=True)
def no_automatic_broadcast(spark: SparkSession) -> Iterator[None]:
    """Disable Spark's automatic broadcast of small tables, so that Spark treats small tables like large tables."""
    with spark_settings(spark, {"spark.sql.autoBroadcastJoinThreshold": "-1"}, required=True):
        yield


def test_the_known_rows_of_a_table_are_not_shuffled_if_few_rows_are_ingested(spark: SparkSession) -> None:
    rows = spark.createDataFrame([("7",), ("new",)], "source_row string")
    shuffled = []
    for count in KNOWN:
        known = spark.range(count).select(F.col("id").cast("string").alias("source_row"))
        added, found = rows_to_add(rows, known, "source_row", 2), rows_with_keys_of(known, rows, "source_row", 2)
        assert [row["source_row"] for frame in (added, found) for row in frame.collect()] == ["new", "7"]
        shuffled.append(count_shuffled_rows(spark, added.collect) + count_shuffled_rows(spark, found.collect))
        many = rows_to_add(rows, known, "source_row", 10**9)
        assert count_shuffled_rows(spark, many.collect) >= count, "a large input is compared by sorting all rows"
    assert shuffled[0] == shuffled[1] < KNOWN[0]


def test_the_known_pictures_are_not_shuffled_if_one_new_picture_resembles_a_known_picture(spark: SparkSession) -> None:
    def pictures(frame: DataFrame, image_id: str, *, existing: bool) -> DataFrame:
        shape = f"repeat(lpad(hex(xxhash64(id)), 16, '0'), {FINGERPRINT_BYTES // 8})"
        return frame.selectExpr(
            f"{image_id} AS image_id", "'train' AS split", f"unhex({shape}) AS fingerprint", f"{existing} AS existing"
        )

    shuffled = []
    for count in KNOWN:
        known = pictures(spark.range(count), "CAST(id AS STRING)", existing=True)
        compared = pictures(spark.range(7, 8), "'new'", existing=False).unionAll(known)
        candidates = find_candidates(shared_keys(compared, 1).localCheckpoint())
        assert [row["other_id"] for row in candidates.collect()] == ["7"]
        pairs = find_pairs(candidates.localCheckpoint(), compared, 1)
        assert [(row["image_id"], row["other_id"]) for row in pairs.collect()] == [("new", "7")]
        shuffled.append(count_shuffled_rows(spark, pairs.collect) + count_shuffled_rows(spark, candidates.collect))
    assert shuffled[0] == shuffled[1] < KNOWN[0]


def test_pictures_that_were_stored_before_are_looked_up_without_shuffling_all_known_pictures(
    spark: SparkSession,
) -> None:
    begun = datetime(2026, 1, 2, tzinfo=UTC)
    times = {"old": F.lit(begun - timedelta(days=1)), "new": F.lit(begun + timedelta(seconds=1))}
    new = spark.range(5, 6).union(spark.range(-1, 0)).select("id", times["new"].alias("ingested_at"))
    shuffled = []
    for count in KNOWN:
        known = spark.range(count).union(spark.range(3)).select("id", times["old"].alias("ingested_at"))
        pictures = known.unionAll(new).withColumn("sha256", F.col("id").cast("string"))
        found = stored_again(pictures, begun, 2)
        assert [row["sha256"] for row in found.collect()] == ["5"]
        shuffled.append(count_shuffled_rows(spark, found.collect))
    assert shuffled[0] == shuffled[1] < KNOWN[0]


def test_replayed_rows_that_are_refused_again_are_looked_up_without_shuffling_all_known_pictures(
    spark: SparkSession,
) -> None:
    rows = [("row 7", "7"), ("row 1", "lost"), ("row 5", None), ("lost", None)]
    refused = spark.createDataFrame(rows, "source_row string, claimed_id string")
    shuffled = []
    for count in KNOWN:
        samples = spark.range(count).selectExpr("CAST(id AS STRING) AS image_id", "concat('row ', id) AS source_row")
        lost = lost_rows(refused, samples, len(rows))
        assert sorted(row["source_row"] for row in lost.collect()) == ["lost", "row 1"]
        shuffled.append(count_shuffled_rows(spark, lost.collect))
    assert shuffled[0] == shuffled[1] < KNOWN[0]


@pytest.mark.parametrize("kind", ["text", "webdataset"])
def test_many_small_files_are_read_by_a_fixed_number_of_tasks(
    spark: SparkSession, platform: Platform, tmp_path: Path, kind: str
) -> None:
    for number in range(500):
        (tmp_path / f"{number}.{'txt' if kind == 'text' else 'tar'}").write_bytes(b"some text")
    config = DataConfig.model_validate({"source": {"kind": kind, "path": str(tmp_path)}})
    opened = open_source(spark, platform, "growth", config, items_table([]))
    assert opened.rows is not None
    tasks = opened.rows.frame.groupBy(F.spark_partition_id().alias("task")).count().collect()
    assert len(tasks) == MIN_TASKS
    assert sum(task["count"] for task in tasks) == 500
    for path in list(tmp_path.iterdir())[3:]:
        path.unlink()
    for path in tmp_path.iterdir():
        os.truncate(path, 2**30)
    opened = open_source(spark, platform, "growth", config, items_table([]))
    assert opened.rows is not None
    assert [row["count"] for row in opened.rows.frame.groupBy(F.spark_partition_id()).count().collect()] == [1] * 3


@pytest.mark.matrix
def test_one_new_row_of_a_captions_file_of_many_rows_is_read_by_one_task(
    spark: SparkSession, platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 40
    (tmp_path / "a.png").write_bytes(b"a picture")
    lines = [f"a.png,text {number}" for number in range(rows)]
    (tmp_path / "captions.csv").write_text("\n".join(["file_name,text", *lines]), encoding="utf-8")
    source = {"kind": "folder", "path": str(tmp_path), "captions": "captions.csv"}
    config = DataConfig.model_validate({"source": source})
    monkeypatch.setattr(folder, "CAPTION_BYTES_PER_TASK", 20)
    monkeypatch.setattr(folder, "ROWS_PER_TASK", 2)
    every = open_source(spark, platform, "growth", config, items_table([]))
    assert isinstance(every.pending, pa.Table)
    new = open_source(spark, platform, "growth", config, every.pending.slice(1))
    tasks = {}
    for opened in (every, new):
        assert opened.rows is not None
        tasks[opened.num_pending] = opened.rows.frame.rdd.getNumPartitions()
    assert tasks == {rows: 1 + rows // 2, 1: 1}


@pytest.mark.matrix
def test_a_caption_job_of_one_row_shuffles_no_picture_of_the_captioned_rows(
    spark: SparkSession, platform: Platform, tmp_path: Path
) -> None:
    picture_bytes = 50_000
    for count in (20, 80):
        path, ids = tmp_path / str(count), [str(number) for number in range(count)]
        pictures = [os.urandom(picture_bytes) for _ in ids]
        write_deltalake(path, pa.table({"id": ids, "photo": pictures}))
        source = open_source_table(spark, platform, f"delta.`{path}`", None, columns=("id", "photo"), where="")
        columns = ("'picture' AS sha256", "CAST(NULL AS STRING) AS error", "source_file")
        captions = source.rows.filter("image_id != '7'").selectExpr("image_id", *columns)
        todo, counts = find_uncaptioned_rows(captions, source, "id", retry_errors=False)
        assert (counts.rows, counts.todo) == (count, 1)
        assert [bytes(row["image"]) for row in todo.collect()] == [pictures[7]]
        assert count_shuffled_bytes(spark, todo.collect) < picture_bytes
