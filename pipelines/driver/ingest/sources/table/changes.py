"""Read the rows of a Delta table that changed since the last ingest, from the table's change data feed."""

from __future__ import annotations

import logging
from functools import partial
from typing import NamedTuple

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from pipelines.config import TableSourceConfig
from pipelines.driver.delta.spark_errors import filter_rows, retention_fix
from pipelines.driver.delta.versions import MAINTENANCE_OPERATIONS
from pipelines.driver.ingest.sources.files import absolute_path
from pipelines.executor.ingest.records.table import add_image_ids
from pipelines.platform import spark_errors

logger = logging.getLogger(__name__)

BROADCAST_IDS = 1_000_000
"""Largest number of updated and deleted rows whose ids are sent to every executor, so that the join sends no pictures
between executors."""
KEYS = (T.StringType, T.CharType, T.VarcharType, T.NumericType, T.DateType, T.TimestampType, T.TimestampNTZType)
"""Spark types of an id column by which rows of the change data feed can be looked up in the table."""


class SourceTable(NamedTuple):
    """A source table at one version.

    Attributes:
        frame: rows of the table.
        table_id: id that Delta gave to the table.
        version: version of the table.
        commit: id of the commit that made this version, or None if Delta no longer keeps the commit.
        name: name of the table in SQL.
    """

    frame: DataFrame
    table_id: str
    version: int
    commit: str | None
    name: str


class Changes(NamedTuple):
    """Rows to read from a table.

    Attributes:
        rows: rows to read.
        image_ids: ids (column `image_id`) of pictures whose rows may be gone, or None if no row can be gone.
    """

    rows: DataFrame
    image_ids: DataFrame | None


def quote_name(name: str) -> str:
    """Quote a name of a column or table for SQL."""
    return f"`{name.replace('`', '``')}`"


def read_changes(
    spark: SparkSession, table: SourceTable, name: str, source: TableSourceConfig, last: int
) -> Changes | None:
    """Read the rows that changed after version `last`. Return None if all rows of the table must be read."""
    if _only_maintained(spark, table, last):
        return Changes(table.frame.filter(F.lit(False)), None)
    try:
        changes = _open_feed(spark, source, last + 1, table.version)
        return _select_changed(table.frame, changes, name, source)
    except spark_errors() as error:
        logger.info(
            "the change data feed of table %s after version %d cannot be read, so all rows are read: %s",
            source.where,
            last,
            retention_fix(error) or str(error).strip().partition("\n")[0][:500],
        )
        logger.debug("%s", error)
        return None


def _only_maintained(spark: SparkSession, table: SourceTable, last: int) -> bool:
    """Return true if, according to the table's history, all versions after `last` left the rows unchanged."""
    commits = spark.sql(f"DESCRIBE HISTORY {table.name}").filter(F.col("version").between(last + 1, table.version))
    operations = [row["operation"] for row in commits.select("operation").collect()]
    return len(operations) == table.version - last and MAINTENANCE_OPERATIONS.issuperset(operations)


def _open_feed(spark: SparkSession, source: TableSourceConfig, first: int, last: int) -> DataFrame:
    reader = spark.read.option("readChangeFeed", "true").option("startingVersion", first).option("endingVersion", last)
    return reader.table(source.table) if source.table else reader.format("delta").load(absolute_path(source.path))


def _select_changed(frame: DataFrame, changes: DataFrame, name: str, source: TableSourceConfig) -> Changes | None:
    """Given the rows of the change data feed, select the rows that the ingest must read.

    If rows were updated or deleted, all current rows with the ids of these rows are read: from the change data feed
    where it contains all of them, else from the table. If the source has no id column, another row may have the picture
    of a deleted row, so all rows must be read (the result is None).

    Raises:
        PySparkException, Py4JError: the change data feed lacks a column of the table, or one of its files cannot be
            read.
    """
    added = changes.filter("_change_type IN ('insert', 'update_postimage')")
    added = added.select(*(F.col(quote_name(column)) for column in frame.columns), "_commit_version")
    added = filter_rows(added, source.filter, where="data.source.filter")
    key = source.columns.id
    key_column = F.col(quote_name(key or source.columns.image))
    # Spark notices a missing change data feed or a missing file only when rows are read, so this query reads the key
    # column from every file.
    seen = changes.agg(
        F.count_if(F.col("_change_type").isin("delete", "update_preimage")).alias("old"),
        F.count(key_column).alias("read"),
    ).collect()[0]
    if not seen["old"]:
        return Changes(added.drop("_commit_version"), None)
    if key is None or not isinstance(changes.schema[key].dataType, KEYS):
        logger.info("table %s has updated or deleted rows without ids, so all rows are read", source.where)
        return None
    counts = _count_rows(frame, changes, added, key)
    schema = T.StructType([*counts.schema.fields, T.StructField("image_id", T.StringType())])
    counts = counts.mapInArrow(partial(add_image_ids, source=name), schema)
    touched_ids = counts.filter("is_old").select("image_id").distinct()
    touched = counts.join(touched_ids, "image_id", "left_semi")
    if seen["old"] <= BROADCAST_IDS:
        touched = F.broadcast(touched)
    return Changes(_select_current(frame, added, touched, key), touched_ids)


def _count_rows(frame: DataFrame, changes: DataFrame, added: DataFrame, key: str) -> DataFrame:
    """Count the rows of each id in the table and in the change data feed. The column with the pictures is not read.

    Args:
        frame: current rows of the table that pass the source's filter.
        changes: rows of the change data feed.
        added: added rows and new versions of updated rows that pass the source's filter.
        key: name of the id column.

    Returns:
        Columns `key`, `version` (newest version of the table that changed a row with this id; -1 if no version did),
        `in_feed` (rows that this version added or updated), `in_table` (current rows) and `is_old` (whether a row with
        this id was updated or deleted).
    """
    key_column, version = F.col(quote_name(key)).alias("key"), F.col("_commit_version").alias("version")
    is_old = F.col("_change_type").isin("delete", "update_preimage").alias("is_old")
    seen = changes.select(key_column, version, F.lit(0).alias("in_feed"), is_old)
    new = added.select(key_column, version, F.lit(1).alias("in_feed"), F.lit(False).alias("is_old"))
    versions = (
        seen.unionAll(new)
        .groupBy("key", "version")
        .agg(F.sum("in_feed").alias("in_feed"), F.max("is_old").alias("is_old"))
    )
    of_key = versions.groupBy("key").agg(
        F.max("version").alias("version"),
        F.max_by("in_feed", "version").alias("in_feed"),
        F.max("is_old").alias("is_old"),
    )
    current = frame.select(
        key_column,
        F.lit(-1).alias("version"),
        F.lit(0).alias("in_feed"),
        F.lit(False).alias("is_old"),
        F.lit(1).alias("in_table"),
    )
    every = current.unionAll(of_key.select("key", "version", "in_feed", "is_old", F.lit(0)))
    largest = [F.max(column).alias(column) for column in ("version", "in_feed", "is_old")]
    return every.groupBy("key").agg(*largest, F.sum("in_table").alias("in_table"))


def _select_current(frame: DataFrame, added: DataFrame, touched: DataFrame, key: str) -> DataFrame:
    """Select the added rows, and all current rows with an id of an updated or deleted row.

    The newest version that changed an id has written `in_feed` of the current rows with this id. If the table has no
    other row with this id, these rows are taken from the change data feed, so that the pictures of the table are not
    read.

    Args:
        frame: current rows of the table that pass the source's filter.
        added: added rows and new versions of updated rows that pass the source's filter.
        touched: rows of `_count_rows` whose picture has an updated or deleted row.
        key: name of the id column.
    """
    key_column, is_complete = quote_name(key), F.col("in_feed") == F.col("in_table")
    known = touched.select("key", "version", is_complete.alias("is_complete"))
    is_current = known["key"].isNull() | (known["is_complete"] & (known["version"] == added["_commit_version"]))
    rows = added.join(known, added[key_column].eqNullSafe(known["key"]), "left").filter(is_current)
    rows = rows.select(*(added[quote_name(column)] for column in frame.columns))
    incomplete = touched.filter(~is_complete)
    if incomplete.isEmpty():
        return rows
    return rows.unionAll(frame.join(incomplete, frame[key_column].eqNullSafe(incomplete["key"]), "left_semi"))
