"""Merging into the tables of an ingest: each table in one Delta commit, checked against what was planned."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime

from delta.tables import DeltaMergeBuilder, DeltaTable
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.driver.plan import Totals
from pipelines.driver.session import stored_as_they_are
from pipelines.errors import StageFailed
from pipelines.platform import Platform
from pipelines.tables import SAMPLES

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stamp:
    """What is the same for every row that one ingest brings."""

    source: str
    ingest_id: str
    at: datetime


def rows_of_source(spark: SparkSession, platform: Platform, table: str, source: str) -> DataFrame:
    """The rows that one data config brought into a table."""
    return spark.table(platform.table(table)).filter(F.col("source") == source)


def merge_samples(platform: Platform, outcomes: DataFrame, plan: DataFrame, stamp: Stamp, totals: Totals) -> None:
    """Insert new pictures and add new texts to known ones, in one commit. The plan has a column `near_of` here."""
    pictures = outcomes.select("number", "image", "format", "width", "height")
    rows = (
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
    merge = merge_into(platform.table(SAMPLES.name), rows, "image_id", stamp.source).whenNotMatchedInsertAll()
    if totals.updated:  # Delta merges in one pass where there is nothing to update
        both = F.expr("array_sort(array_union(known.texts, came.texts))")
        merge = merge.whenMatchedUpdate(set={"texts": both})
    with stored_as_they_are(outcomes.sparkSession):
        written = merge.execute()
    expect(written, SAMPLES.name, inserted=totals.new, updated=totals.updated)
    logger.info("%d new pictures, %d with new texts", totals.new, totals.updated)


def merge_into(table: str, came: DataFrame, key: str, source: str) -> DeltaMergeBuilder:
    """A merge of rows of one source. Its name as a literal lets Delta skip the files of others."""
    same = (F.col("known.source") == source) & (F.col(f"known.{key}") == F.col(f"came.{key}"))
    return DeltaTable.forName(came.sparkSession, table).alias("known").merge(came.alias("came"), same)


def expect(metrics: DataFrame, table: str, *, inserted: int, updated: int) -> None:
    """Compare what Delta says it wrote with what was planned.

    Raises:
        StageFailed: they differ.
    """
    row = metrics.collect()[0]
    if (row["num_inserted_rows"], row["num_updated_rows"]) != (inserted, updated):
        raise StageFailed(
            "a merge did not write what was planned",
            where=f"table {table}",
            got=f"{row['num_inserted_rows']} inserted and {row['num_updated_rows']} updated, "
            f"not {inserted} and {updated}",
            fix="did another ingest of this source run at the same time? Run it again: what is there is not doubled",
        )
