"""Writing into the tables of an ingest: each table in one Delta commit, checked against what was planned."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime

from delta.tables import DeltaMergeBuilder, DeltaTable
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.driver.delta.retry import Overtaken
from pipelines.driver.delta.settings import stored_as_they_are
from pipelines.driver.delta.versions import since
from pipelines.driver.ingest.plan import Totals
from pipelines.driver.ingest.spill import Waiting
from pipelines.formats.tables import SAMPLES
from pipelines.platform import Platform

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stamp:
    """What is the same for every row that one ingest brings, and what its plan is made on.

    Attributes:
        source: name of the data config.
        ingest_id: of the source as it is.
        at: when; of each plan another time.
        since: the version of `samples` that last changed the source when it was planned.
    """

    source: str
    ingest_id: str
    at: datetime
    since: int


def rows_of_source(spark: SparkSession, platform: Platform, table: str, source: str) -> DataFrame:
    """The rows that one data config brought into a table."""
    return spark.table(platform.table(table)).filter(F.col("source") == source)


def add_samples(platform: Platform, waiting: Waiting, plan: DataFrame, stamp: Stamp, totals: Totals) -> None:
    """Insert new pictures and add new texts to known ones, in one commit. The plan has a column `near_of` here.

    Raises:
        Overtaken: another ingest of the source committed since it was planned; nothing is written then.
    """
    spark = plan.sparkSession
    table = platform.table(SAMPLES.name)
    brought = plan.filter("NOT conflicting AND size(fresh) > 0")
    rows = _samples(waiting, brought.filter("is_new"), stamp)
    with stored_as_they_are(spark), since(spark, stamp.source, stamp.since):
        if totals.updated:
            texts = brought.filter("NOT is_new").select("image_id", F.col("fresh").alias("texts"))
            merge = merge_into(table, rows.unionByName(texts, allowMissingColumns=True), "image_id", stamp.source)
            both = F.expr("array_sort(array_union(known.texts, came.texts))")
            merge = merge.whenMatchedUpdate(set={"texts": both})
            written = merge.whenNotMatchedInsertAll(condition="came.image IS NOT NULL").execute()
            expect(written, inserted=totals.new, updated=totals.updated)
        else:  # a merge would join all rows with the table once more, pictures and all
            rows.writeTo(table).append()
            expect_written(spark, table, "ingested_at", stamp, totals.new)
    logger.info("%d new pictures, %d with new texts", totals.new, totals.updated)


def replace_samples(platform: Platform, waiting: Waiting, plan: DataFrame, stamp: Stamp, totals: Totals) -> None:
    """Put the planned pictures in the place of all of their source, in one commit; planned as if there were none.

    Raises:
        Overtaken: another ingest of the source committed since it was planned; nothing is written then.
    """
    spark = plan.sparkSession
    table = platform.table(SAMPLES.name)
    rows = _samples(waiting, plan.filter("NOT conflicting"), stamp)
    with stored_as_they_are(spark), since(spark, stamp.source, stamp.since):
        rows.writeTo(table).overwrite(F.col("source") == stamp.source)
    expect_written(spark, table, "ingested_at", stamp, totals.new)
    logger.info("%d pictures in the place of those before", totals.new)


def _samples(waiting: Waiting, plan: DataFrame, stamp: Stamp) -> DataFrame:
    """Rows of `samples`, in the order of its columns."""
    rows = plan.select(
        *("image_id", "sha256", "place", "place.format", "place.width", "place.height"),
        F.array_sort("fresh").alias("texts"),
        *("split", "source_row", "fingerprint", "near_of"),
    )
    constants = {"source": stamp.source, "ingest_id": stamp.ingest_id, "ingested_at": stamp.at}
    stamped = {name: F.lit(value) for name, value in constants.items()}
    return waiting.join(rows, "image").withColumns(stamped).select(SAMPLES.names)


def remove_samples(spark: SparkSession, platform: Platform, source: str, ids: DataFrame) -> int:
    """Remove the pictures of a source that have one of the ids, given as the source has them; how many those were."""
    there = rows_of_source(spark, platform, SAMPLES.name, source).select("image_id")
    named = F.concat(F.lit(f"{source}/"), F.trim(F.col("id").cast("string"))).alias("image_id")
    gone = there.join(ids.select(named), "image_id", "left_semi")
    if gone.isEmpty():
        return 0
    [row] = merge_into(platform.table(SAMPLES.name), gone, "image_id", source).whenMatchedDelete().execute().collect()
    return int(row["num_deleted_rows"])


def merge_into(table: str, came: DataFrame, key: str, source: str) -> DeltaMergeBuilder:
    """A merge of rows of one source. Its name as a literal lets Delta skip the files of others."""
    same = (F.col("known.source") == source) & (F.col(f"known.{key}") == F.col(f"came.{key}"))
    return DeltaTable.forName(came.sparkSession, table).alias("known").merge(came.alias("came"), same)


def expect(metrics: DataFrame, *, inserted: int, updated: int) -> None:
    """Compare what Delta says it wrote with what was planned.

    Raises:
        Overtaken: they differ, or Delta wrote nothing because others had been faster (`session.since`).
    """
    row = metrics.head()
    found = (row["num_inserted_rows"], row["num_updated_rows"]) if row else (0, 0)
    if found != (inserted, updated):
        raise Overtaken(f"{found[0]} inserted and {found[1]} updated, not {inserted} and {updated}")


def expect_written(spark: SparkSession, table: str, when: str, stamp: Stamp, planned: int) -> None:
    """Compare the rows that a table has of this plan, by a column that says when, with what was planned.

    Raises:
        Overtaken: they differ: Delta wrote nothing because others had been faster (`session.since`).
    """
    ours = (F.col("source") == stamp.source) & (F.col(when) == stamp.at)
    written = spark.table(table).filter(ours).count()
    if written != planned:
        raise Overtaken(f"{table} has {written} of {planned} rows that were planned")
