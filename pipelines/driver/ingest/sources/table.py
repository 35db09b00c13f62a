"""A Delta table, by name or by path, read at one version; after the first time only what changed since, if it says so.

What changed comes from the table's change data feed. A table without one is read anew, from beginning to end, whenever
it has a new version: that adds nothing twice, but takes its time.
"""

from __future__ import annotations

import logging
from functools import partial

import pyarrow as pa
from pyspark.errors import AnalysisException, PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.config import DataConfig, TableSourceConfig, short_hash
from pipelines.driver.delta.failures import filtered
from pipelines.driver.ingest.ledger import items_of
from pipelines.driver.ingest.sources.files import Rows, Source, absolute, demand_columns
from pipelines.driver.ingest.sources.parquet import columns_for_table_records
from pipelines.errors import UserError
from pipelines.executor.ingest.records import table_records

logger = logging.getLogger(__name__)

VERSION = "version "


def open_table(
    spark: SparkSession, name: str, source: TableSourceConfig, config: DataConfig, taken: pa.Table
) -> Source:
    """The rows of a version that were not there at the version taken in before: the one that is asked for, else the
    newest of now.

    Where the table has a change data feed and rows have ids, what was updated or deleted is `gone` and, where it still
    is there, read again. Without ids nobody knows whether another row has the same picture: then it stays.

    Raises:
        UserError: no table is named, there is none, it has no such version, or a column is missing.
    """
    if not source.where:
        fix = "--set data.source.table=CATALOG.SCHEMA.TABLE, or --set data.source.path=FOLDER"
        raise UserError("the run has no input", where="data.source.table", got="nothing", fix=fix)
    parts = source.table.split(".") if source.table else ("delta", absolute(source.path))
    quoted = ".".join(f"`{part.replace('`', '``')}`" for part in parts)
    try:
        newest = spark.sql(f"DESCRIBE HISTORY {quoted} LIMIT 1").collect()[0]["version"]
        identity = spark.sql(f"DESCRIBE DETAIL {quoted}").collect()[0]["id"]
        version = newest if source.version is None else source.version
        frame = spark.sql(f"SELECT * FROM {quoted} VERSION AS OF {version}")  # noqa: S608 (quoted)
    except AnalysisException as error:
        raise UserError(
            "the input is no Delta table that can be read",
            where=source.where,
            got=str(error).partition("\n")[0][:500],
            fix="name a Delta table and a version of it that is there: `DESCRIBE HISTORY` lists them",
        ) from None
    demand_columns(config, frame.columns, source.where)
    frame = filtered(frame, source.filter, where="data.source.filter")
    ingest_id = short_hash(name, identity, version)
    before = [row["state"] for row in taken.to_pylist() if row["item"] == identity]
    versions = [int(state.removeprefix(VERSION)) for state in before]
    if version in versions:
        return Source(None, ingest_id, items_of([]), 1)
    last = max(versions, default=version)
    changes = _changes(spark, source, last + 1, version) if last < version else None
    rows, gone = (frame, None) if changes is None else _changed(frame, changes, source)
    named = columns_for_table_records(rows, F.lit(source.where.rstrip("/").rpartition("/")[2]))
    read = partial(table_records, image=source.columns.image)
    return Source(Rows(named, read), ingest_id, items_of([(identity, f"{VERSION}{version}")]), 0, gone)


def _changes(spark: SparkSession, source: TableSourceConfig, first: int, last: int) -> DataFrame | None:
    """The table's change data feed, or None where it does not reach back so far."""
    reader = spark.read.option("readChangeFeed", "true").option("startingVersion", first).option("endingVersion", last)
    try:
        changes = reader.table(source.table) if source.table else reader.format("delta").load(absolute(source.path))
        changes.limit(1).collect()  # whether the feed is there is only known when it is read
    except PySparkException as error:
        logger.info("%s has no change data feed from version %d on: all of it is read", source.where, first)
        logger.debug("%s", error)
        return None
    return changes


def _changed(frame: DataFrame, changes: DataFrame, source: TableSourceConfig) -> tuple[DataFrame, DataFrame | None]:
    """Rows to read, and the ids of rows that were updated or deleted. Of these all rows that are there are read."""
    came = changes.filter("_change_type IN ('insert', 'update_postimage')").select(*frame.columns)
    came = filtered(came, source.filter, where="data.source.filter")
    id_column = source.columns.id
    if id_column is None:
        return came, None
    one = F.col(f"`{id_column.replace('`', '``')}`")
    gone = changes.filter("_change_type IN ('delete', 'update_preimage')").select(one.alias("id")).distinct()
    still = frame.join(gone, one == gone["id"], "left_semi")
    return came.join(gone, one == gone["id"], "left_anti").unionAll(still), gone
