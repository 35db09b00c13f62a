"""Delta table sources: the first ingest reads one version of a table, and later ingests read only the changes.

The changes come from the table's change data feed. A table without a change data feed is read completely whenever the
table has a new version. Reading the complete table takes longer, but adds no row twice.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import NamedTuple

import pyarrow as pa
from pyspark.errors import AnalysisException, PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.config import DataConfig, TableSourceConfig, short_hash
from pipelines.driver.delta.spark_errors import filter_rows
from pipelines.driver.ingest.ledger import items_table
from pipelines.driver.ingest.sources.files import absolute_path
from pipelines.driver.ingest.sources.parquet import prepend_file
from pipelines.driver.ingest.sources.source import Source, SourceRows, require_columns
from pipelines.errors import UserError
from pipelines.executor.ingest.records.table import table_records

logger = logging.getLogger(__name__)

VERSION = "version "
"""Prefix of a table's state in the ledger. The state consists of this prefix and the version number of the table."""


class _TableVersion(NamedTuple):
    """A table at one version; `table_id` is Delta's own id of the table."""

    frame: DataFrame
    table_id: str
    version: int


def open_table(
    spark: SparkSession, name: str, source: TableSourceConfig, config: DataConfig, ingested: pa.Table
) -> Source:
    """Open the configured or newest version of a table, and select the rows added since the last ingested version.

    If the table has a change data feed and its rows have ids, the ids of updated and deleted rows are `stale_ids`, and
    updated rows are read again. If the rows have no ids, no picture is removed, because other rows may contain the same
    picture.

    Raises:
        UserError: no table is named, the table or version does not exist, or a column is missing.
    """
    frame, table_id, version = _read_version(spark, source)
    require_columns(config, frame.columns, source.where)
    frame = filter_rows(frame, source.filter, where="data.source.filter")
    ingest_id = short_hash(name, table_id, version)
    states = [row["state"] for row in ingested.to_pylist() if row["item"] == table_id]
    versions = [int(state.removeprefix(VERSION)) for state in states]
    if version in versions:
        return Source(None, ingest_id, items_table([]), 1)
    last = max(versions, default=version)
    changes = _read_changes(spark, source, last + 1, version) if last < version else None
    rows, stale_ids = (frame, None) if changes is None else _select_changed(frame, changes, source)
    with_file = prepend_file(rows, F.lit(source.where.rstrip("/").rpartition("/")[2]))
    read = partial(table_records, image=source.columns.image)
    pending = items_table([(table_id, f"{VERSION}{version}")])
    return Source(SourceRows(with_file, read), ingest_id, pending, 0, stale_ids)


def _read_version(spark: SparkSession, source: TableSourceConfig) -> _TableVersion:
    if not source.where:
        fix = "--set data.source.table=CATALOG.SCHEMA.TABLE, or --set data.source.path=FOLDER"
        raise UserError("the run has no input", where="data.source.table", got="nothing", fix=fix)
    parts = source.table.split(".") if source.table else ("delta", absolute_path(source.path))
    quoted = ".".join(f"`{part.replace('`', '``')}`" for part in parts)
    try:
        newest = spark.sql(f"DESCRIBE HISTORY {quoted} LIMIT 1").collect()[0]["version"]
        table_id = spark.sql(f"DESCRIBE DETAIL {quoted}").collect()[0]["id"]
        version = newest if source.version is None else source.version
        frame = spark.sql(f"SELECT * FROM {quoted} VERSION AS OF {version}")  # noqa: S608 (quoted)
    except AnalysisException as error:
        raise UserError(
            "the input cannot be read as a Delta table",
            where=source.where,
            got=str(error).partition("\n")[0][:500],
            fix="name an existing Delta table and one of the versions that `DESCRIBE HISTORY` lists",
        ) from None
    return _TableVersion(frame, table_id, version)


def _read_changes(spark: SparkSession, source: TableSourceConfig, first: int, last: int) -> DataFrame | None:
    """Read the change data feed of the table; return None if the table has no feed from version `first` on."""
    reader = spark.read.option("readChangeFeed", "true").option("startingVersion", first).option("endingVersion", last)
    try:
        changes = (
            reader.table(source.table) if source.table else reader.format("delta").load(absolute_path(source.path))
        )
        # Spark notices a missing feed, and files that VACUUM has removed, only when it reads rows of each file.
        changes.select("_change_type").distinct().collect()
    except PySparkException as error:
        logger.info("%s has no change data feed from version %d on: all rows are read", source.where, first)
        logger.debug("%s", error)
        return None
    return changes


def _select_changed(
    frame: DataFrame, changes: DataFrame, source: TableSourceConfig
) -> tuple[DataFrame, DataFrame | None]:
    """Return the rows to read, and the ids of updated and deleted rows.

    All current rows that have the id of an updated or deleted row are read.
    """
    added = changes.filter("_change_type IN ('insert', 'update_postimage')").select(*frame.columns)
    added = filter_rows(added, source.filter, where="data.source.filter")
    id_name = source.columns.id
    if id_name is None:
        return added, None
    id_column = F.col(f"`{id_name.replace('`', '``')}`")
    stale = changes.filter("_change_type IN ('delete', 'update_preimage')").select(id_column.alias("id")).distinct()
    current = frame.join(stale, id_column == stale["id"], "left_semi")
    return added.join(stale, id_column == stale["id"], "left_anti").unionAll(current), stale
