"""Writing into the tables of an ingest: each table in one Delta commit, checked against what was planned."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime

from delta.tables import DeltaMergeBuilder, DeltaTable
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.driver.conflicts import Overtaken
from pipelines.driver.plan import Totals
from pipelines.driver.session import since, stored_as_they_are
from pipelines.platform import Platform
from pipelines.tables import SAMPLES

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


def merge_samples(platform: Platform, pictures: DataFrame, plan: DataFrame, stamp: Stamp, totals: Totals) -> None:
    """Insert new pictures and add new texts to known ones, in one commit. The plan has a column `near_of` here.

    Raises:
        Overtaken: another ingest of the source committed since it was planned; nothing is written then.
    """
    spark = pictures.sparkSession
    rows = _samples(pictures, plan, stamp)
    merge = merge_into(platform.table(SAMPLES.name), rows, "image_id", stamp.source).whenNotMatchedInsertAll()
    if totals.updated:  # Delta merges in one pass where there is nothing to update
        both = F.expr("array_sort(array_union(known.texts, came.texts))")
        merge = merge.whenMatchedUpdate(set={"texts": both})
    with stored_as_they_are(spark, only_new=not totals.updated), since(spark, stamp.source, stamp.since):
        written = merge.execute()
    expect(written, inserted=totals.new, updated=totals.updated)
    logger.info("%d new pictures, %d with new texts", totals.new, totals.updated)


def replace_samples(platform: Platform, pictures: DataFrame, plan: DataFrame, stamp: Stamp, totals: Totals) -> None:
    """Put the planned pictures in the place of all of their source, in one commit; planned as if there were none.

    Raises:
        Overtaken: another ingest of the source committed since it was planned; nothing is written then.
    """
    spark = pictures.sparkSession
    table = platform.table(SAMPLES.name)
    with stored_as_they_are(spark, only_new=True), since(spark, stamp.source, stamp.since):
        _samples(pictures, plan, stamp).writeTo(table).overwrite(F.col("source") == stamp.source)
    written = rows_of_source(spark, platform, SAMPLES.name, stamp.source).filter(F.col("ingested_at") == stamp.at)
    if written.count() != totals.new:
        raise Overtaken(f"{table} does not hold the {totals.new} pictures that were planned")
    logger.info("%d pictures in the place of those before", totals.new)


def _samples(pictures: DataFrame, plan: DataFrame, stamp: Stamp) -> DataFrame:
    """Rows of `samples`: the pictures of the plan that bring something, with their bytes."""
    return (
        plan.filter("NOT conflicting AND size(fresh) > 0")
        .join(pictures, "number")
        .select(
            *("image_id", "sha256", "image", "format", "width", "height"),
            F.array_sort("fresh").alias("texts"),
            "split",
            F.lit(stamp.source).alias("source"),
            "source_row",
            F.lit(stamp.ingest_id).alias("ingest_id"),
            F.lit(stamp.at).alias("ingested_at"),
            "fingerprint",
            "near_of",
        )
    )


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
