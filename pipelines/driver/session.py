"""Small things every stage asks of a Spark session: tables that exist, versions of them, and bounded Arrow batches.

The session itself comes from `Platform.open_spark`; nothing here starts one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyspark.sql import SparkSession

from pipelines.platform import Platform
from pipelines.tables import PROPERTIES, SAMPLES, TABLES, Table

logger = logging.getLogger(__name__)

MAX_BATCH_BYTES = 16 * 2**20
MAX_BATCH_ROWS = 32
NOTE_CONF = "spark.databricks.delta.commitInfo.userMetadata"
UPKEEP = frozenset({"OPTIMIZE", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES", "UNSET TBLPROPERTIES"})
"""Commits that change no row."""


def ensure_tables(spark: SparkSession, platform: Platform) -> None:
    """Create the Delta tables that do not exist yet.

    A laptop's catalog lives in memory: there, tables that an earlier process wrote are registered again, as they are.
    """
    if platform.tables is not None:
        spark.sql(f"CREATE SCHEMA IF NOT EXISTS {platform.namespace} LOCATION {_quoted(platform.tables)}")
    for table in TABLES:
        name = platform.table(table.name)
        if not spark.catalog.tableExists(name):
            spark.sql(_create(name, table, platform.tables))
            logger.info("table %s is ready", name)


def _create(name: str, table: Table, tables: Path | None) -> str:
    location = f" LOCATION {_quoted(tables / table.name)}" if tables else ""
    if tables and (tables / table.name / "_delta_log").is_dir():
        return f"CREATE TABLE IF NOT EXISTS {name} USING DELTA{location}"
    properties = ", ".join(f"'{key}' = '{value}'" for key, value in PROPERTIES.items())
    return (
        f"CREATE TABLE IF NOT EXISTS {name} ({table.ddl()}) USING DELTA{location} "
        f"COMMENT '{table.comment}' TBLPROPERTIES ({properties})"
    )


def _quoted(path: Path) -> str:
    escaped = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def table_id(spark: SparkSession, platform: Platform, table: Table) -> str:
    """Delta's own id of a table: a table dropped and created again has another."""
    return str(spark.sql(f"DESCRIBE DETAIL {platform.table(table.name)}").head()["id"])  # type: ignore[index]


def table_version(spark: SparkSession, platform: Platform, table: Table) -> int:
    """The newest version of a table."""
    return int(spark.sql(f"DESCRIBE HISTORY {platform.table(table.name)} LIMIT 1").head()["version"])  # type: ignore[index]


def dataset_version(spark: SparkSession, platform: Platform, source: str) -> int:
    """The version of `samples` that last changed a row of `source`.

    All sources share one table, so its newest version moves when any of them is ingested; a pin to it would make
    every source's shards stale. Each ingest notes its source in its commit (`commit_note`), and this walks back
    over the commits of other sources and over upkeep. A commit without a note (a DELETE by hand) counts as a
    change, and so does the oldest commit once Delta has expired those before it: the answer may be later than need
    be, never earlier than right.
    """
    history = spark.sql(f"DESCRIBE HISTORY {platform.table(SAMPLES.name)}").select(
        "version", "operation", "userMetadata"
    )
    commits = sorted(history.collect(), key=lambda row: row["version"], reverse=True)
    for commit in commits:
        others = commit["userMetadata"] is not None and commit["userMetadata"] != note_of(source)
        if not others and commit["operation"] not in UPKEEP:
            return int(commit["version"])
    return int(commits[-1]["version"])


def note_of(source: str) -> str:
    """What a commit that changes rows of `source`, and of no other, says in its user metadata."""
    return f"lakesight ingest {source}"


@contextmanager
def commit_note(spark: SparkSession, note: str) -> Iterator[None]:
    """Write `note` into the user metadata of the Delta commits made inside."""
    with _settings(spark, {NOTE_CONF: note}):
        yield


@contextmanager
def bounded_batches(spark: SparkSession) -> Iterator[None]:
    """Bound the Arrow batches that Python workers receive from queries run inside.

    Spark's default of 10,000 rows is 17 GB of megapixel pictures. Spark 4.1 and later also obey the bound in bytes;
    4.0 knows only the bound in rows, which is therefore small: 32 rows of the largest usual pictures are 50 MB.
    """
    with _settings(
        spark,
        {
            "spark.sql.execution.arrow.maxRecordsPerBatch": str(MAX_BATCH_ROWS),
            "spark.sql.execution.arrow.maxBytesPerBatch": str(MAX_BATCH_BYTES),
        },
    ):
        yield


@contextmanager
def _settings(spark: SparkSession, values: dict[str, str]) -> Iterator[None]:
    before = {key: spark.conf.get(key, None) for key in values}
    for key, value in values.items():
        spark.conf.set(key, value)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                spark.conf.unset(key)
            else:
                spark.conf.set(key, value)
