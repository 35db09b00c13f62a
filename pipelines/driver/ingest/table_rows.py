"""Functions for the rows of one source in a Delta table: read the rows, merge updates, and verify a write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import reduce
from operator import and_

from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from pipelines.driver.delta.on_disk import count_on_disk, has_rows, open_on_disk
from pipelines.driver.delta.retry import WriteConflict
from pipelines.driver.delta.settings import FEW_ROWS
from pipelines.driver.delta.versions import note_condition
from pipelines.formats.table_schema import Table
from pipelines.formats.tables import QUARANTINE, SAMPLES, TEXTS
from pipelines.platform import Platform

TIME_COLUMNS = {SAMPLES.name: "ingested_at", TEXTS.name: "ingested_at", QUARANTINE.name: "quarantined_at"}
"""For each table, the name of the column that stores the time of the row's ingest plan."""


@dataclass(frozen=True)
class Stamp:
    """Values that all rows written by one ingest plan share.

    Attributes:
        source: name of the source, which is the name of its data config.
        ingest_id: id of the ingest (`Source.ingest_id`) or of the replay.
        planned_at: time at which the plan was made. Each plan has a different time, so the time identifies the rows of
            the plan.
        base_version: last version of `samples` that had changed the source when the plan was made; 0 for plain text.
    """

    source: str
    ingest_id: str
    planned_at: datetime
    base_version: int


def rows_of_source(spark: SparkSession, platform: Platform, table: str, source: str) -> DataFrame:
    """Select the rows of a table that belong to one data config."""
    return spark.table(platform.table(table)).filter(F.col("source") == source)


def merge_into(table: str, updates: DataFrame, key: str, source: str, *clauses: str) -> Row | None:
    """Merge `updates` into the rows of one source in a table, and return the row counts that Delta reports.

    The name of the source is a literal in the merge condition, so Delta skips the files of other sources. The condition
    also contains the note of the source (`note_condition`), which Delta stores in the table history.

    Args:
        table: full name of the table, whose alias is `target`.
        updates: new rows, whose alias is `updates`.
        key: column that has the same value in a row of the table and in the update of this row.
        source: name of the source, which is the name of its data config.
        clauses: WHEN clauses of the merge, in SQL.
    """
    merge = (
        f"MERGE INTO {table} target USING {{updates}} updates "
        f"ON target.source = {{source}} AND {note_condition(source)} AND target.{key} = updates.{key} "
        + " ".join(clauses)
    )
    return updates.sparkSession.sql(merge, updates=updates, source=source).head()


def verify_merge(row: Row | None, *, inserted: int, updated: int) -> None:
    """Compare the row counts that Delta reports for a merge with the counts of the plan.

    Raises:
        WriteConflict: the counts differ, because another ingest has committed rows of the same source after the plan
            was made. Delta has then skipped the merge, or the WHEN clauses have left out rows.
    """
    found = (row["num_inserted_rows"], row["num_updated_rows"]) if row else (0, 0)
    if found != (inserted, updated):
        raise WriteConflict(
            f"the merge inserted {found[0]} rows and updated {found[1]}, expected {inserted} and {updated}"
        )


def verify_append(spark: SparkSession, platform: Platform, table: Table, stamp: Stamp, expected: int) -> None:
    """Check that a table has the expected number of rows with the source and the time of a plan.

    Raises:
        WriteConflict: the table has a different number of rows, because Delta has skipped the append. Delta skips the
            append if another ingest has committed rows of the same source after the plan was made.
    """
    ours: dict[str, str | datetime] = {"source": stamp.source, TIME_COLUMNS[table.name]: stamp.planned_at}
    written = count_rows(spark, platform, table, ours, by="source").get(stamp.source, 0)
    if written != expected:
        raise WriteConflict(f"table {table.name} has {written} rows of this ingest, expected {expected}")


def count_rows(
    spark: SparkSession, platform: Platform, table: Table, equal: Mapping[str, str | datetime], by: str
) -> dict[str, int]:
    """Count the rows whose columns have the values in `equal`. Return a dict from each value of column `by` to the
    number of rows with this value."""
    if (opened := open_on_disk(platform, table)) is not None:
        return count_on_disk(opened, equal, by)
    rows = spark.table(platform.table(table.name)).filter(
        reduce(and_, (F.col(name) == F.lit(value) for name, value in equal.items()))
    )
    return {row[by]: row["count"] for row in sorted(rows.groupBy(by).count().collect())}


def existing_rows(spark: SparkSession, platform: Platform, table: Table, source: str) -> DataFrame:
    """Like `rows_of_source`, return the rows of a source in a table.

    On a laptop, a source without rows is recognised without Spark. For a source without rows, Spark neither reads the
    Delta log nor joins with the table, because Spark's optimizer knows that `limit(0)` has no rows.
    """
    rows = rows_of_source(spark, platform, table.name, source)
    opened = open_on_disk(platform, table)
    return rows if opened is None or has_rows(opened, {"source": source}) else rows.limit(0)


def rows_with_keys_of(known: DataFrame, rows: DataFrame, key: str, num_rows: int) -> DataFrame:
    """Return the known rows whose key occurs in an input. If the input is large, return all known rows.

    The keys of a small input are sent to all tasks. Without this broadcast, an ingest of one row would sort all known
    rows by key.

    Args:
        known: rows of a table.
        rows: rows of the input.
        key: name of the column to compare.
        num_rows: number of rows of the input, or a larger number.
    """
    return known.join(F.broadcast(rows.select(key).distinct()), key, "left_semi") if num_rows <= FEW_ROWS else known


def rows_to_add(rows: DataFrame, known: DataFrame, key: str, num_rows: int) -> DataFrame:
    """Return the rows of an input whose key no known row has. The arguments are those of `rows_with_keys_of`."""
    found = rows_with_keys_of(known, rows, key, num_rows)
    return rows.join(F.broadcast(found) if num_rows <= FEW_ROWS else found, key, "left_anti")
