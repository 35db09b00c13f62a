"""Times of new rows, each later than the times of all existing rows even if the clock was set back.

Readers use the times of the rows to find the last decision on a model, the newest caption of a picture and the last
ingest of a table. Without this correction, a row that was written while the clock was ahead would count as newer than
the rows of later jobs.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from pipelines.driver.delta.on_disk import equal_to, open_on_disk
from pipelines.formats.delta_files import query_rows
from pipelines.formats.table_schema import Table
from pipelines.platform import Platform

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession


def later_than(newest: datetime | None) -> datetime:
    """Return the present time, or one microsecond after `newest` if the clock is not later than `newest`."""
    now = datetime.now(UTC)
    return now if newest is None or newest < now else newest + timedelta(microseconds=1)


def newest_time(rows: DataFrame, column: str) -> datetime | None:
    """Return the newest time in a column, or None if there are no rows."""
    from pyspark.sql import functions as F

    found: datetime | None = rows.agg(F.max(column)).toArrow()[0][0].as_py()
    return found


def newest_stored_time(
    spark: SparkSession, platform: Platform, table: Table, column: str, equal: Mapping[str, str]
) -> datetime | None:
    """Return the newest time in a column of one of Lakesight's tables, or None if there are no rows.

    A table in a local folder is read without Spark, which saves the time of a Spark query.

    Args:
        spark: Spark session.
        platform: platform that has the table.
        table: table to read.
        column: name of the column of times.
        equal: non-empty dict from the name of a text column to the value that the column must have.
    """
    if (opened := open_on_disk(platform, table)) is not None:
        newest: datetime | None = query_rows(opened, f"max({column}) AS newest", equal_to(equal))[0]["newest"]
        return newest
    rows = spark.table(platform.table(table.name))
    for name, value in equal.items():
        rows = rows.where(rows[name] == value)
    return newest_time(rows, column)
