"""Functions for the rows of one source in a Delta table: read the rows, merge updates, and verify a write."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from pipelines.driver.delta.retry import WriteConflict
from pipelines.platform import Platform


@dataclass(frozen=True)
class Stamp:
    """Values that all rows written by one plan share.

    Attributes:
        source: name of the data config.
        ingest_id: hash of the source and its files.
        planned_at: time of the plan, which all written rows carry and which is different for each plan.
        base_version: version of `samples` that last changed the source when the plan was made.
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

    The name of the source is a literal in the merge condition, so Delta skips the files of other sources.

    Args:
        table: full name of the table, whose alias is `target`.
        updates: new rows, whose alias is `updates`.
        key: column that is equal in a row of the table and its new row.
        source: name of the data config.
        clauses: WHEN clauses of the merge, in SQL.
    """
    merge = (
        f"MERGE INTO {table} target USING {{updates}} updates "
        f"ON target.source = {{source}} AND target.{key} = updates.{key} {' '.join(clauses)}"
    )
    return updates.sparkSession.sql(merge, updates=updates, source=source).head()


def verify_merge(row: Row | None, *, inserted: int, updated: int) -> None:
    """Compare the row counts that Delta reports for a merge with the counts of the plan.

    Raises:
        WriteConflict: the counts differ, because Delta skips the merge if another ingest of the source has committed
            since the plan was made.
    """
    found = (row["num_inserted_rows"], row["num_updated_rows"]) if row else (0, 0)
    if found != (inserted, updated):
        raise WriteConflict(f"{found[0]} rows inserted and {found[1]} updated, expected {inserted} and {updated}")


def verify_append(spark: SparkSession, table: str, time_column: str, stamp: Stamp, expected: int) -> None:
    """Check that a table has the expected number of rows with the source and the time of a plan.

    Raises:
        WriteConflict: the table has a different number of rows, because Delta skips the append if another ingest of the
            source has committed since the plan was made.
    """
    ours = (F.col("source") == stamp.source) & (F.col(time_column) == stamp.planned_at)
    written = spark.table(table).filter(ours).count()
    if written != expected:
        raise WriteConflict(f"{table} has {written} rows of this plan, expected {expected}")
