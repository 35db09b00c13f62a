"""The project's Delta tables: created where they are missing, and brought up to date where they are old.

The session itself comes from `Platform.open_spark`; nothing here starts one.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pyspark.sql import SparkSession

from pipelines.formats.tables import TABLES, Table
from pipelines.platform import Platform

logger = logging.getLogger(__name__)

CHECK = "delta.constraints."
"""What the property of a table begins with that holds a check."""

CREATED_IN = 10
"""Seconds from the folder of a table's log to its first commit, at most."""


def ensure_tables(spark: SparkSession, platform: Platform) -> None:
    """Create the Delta tables that do not exist yet, and give those of an earlier version the columns that they lack.

    A laptop's catalog lives in memory: there, tables that an earlier process wrote are registered again, as they are.
    """
    if platform.tables is not None:
        spark.sql(f"CREATE SCHEMA IF NOT EXISTS {platform.namespace} LOCATION {_quoted(platform.tables)}")
    for table in TABLES:
        ensure_table(spark, platform, table)


def ensure_table(spark: SparkSession, platform: Platform, table: Table) -> None:
    """Create one table, or bring it up to date, as `ensure_tables` does."""
    name, folder = platform.table(table.name), platform.tables and platform.tables / table.name
    if not spark.catalog.tableExists(name):
        location = f" LOCATION {_quoted(folder)}" if folder else ""
        if folder and _is_written(folder):
            spark.sql(f"CREATE TABLE IF NOT EXISTS {name} USING DELTA{location}")
        else:
            spark.sql(_create(name, table, location))
            if not folder:
                add_checks(spark, name, table.checks)
    add_columns(spark, platform, table)


def add_checks(spark: SparkSession, name: str, checks: Mapping[str, str]) -> tuple[str, ...]:
    """Have Delta demand of every row what it does not yet; the names of these checks."""
    properties = spark.sql(f"SHOW TBLPROPERTIES {name}").collect() if checks else []
    there = {row["key"].removeprefix(CHECK) for row in properties}
    lacking = tuple(check for check in checks if check not in there)
    for check in lacking:
        spark.sql(f"ALTER TABLE {name} ADD CONSTRAINT {check} CHECK ({checks[check]})")
    return lacking


def add_columns(spark: SparkSession, platform: Platform, table: Table) -> None:
    """Add the columns that a table of an earlier version lacks. Such columns are nullable."""
    name = platform.table(table.name)
    there = set(spark.table(name).columns)
    further = [column.ddl() for column in table.columns if column.name not in there]
    if further:
        spark.sql(f"ALTER TABLE {name} ADD COLUMNS ({', '.join(further)})")


def _create(name: str, table: Table, location: str) -> str:
    clustered = f" CLUSTER BY ({', '.join(table.cluster_by)})" if table.cluster_by else ""
    # A plain folder's table has its checks from its first commit on. A catalog may demand a statement for each.
    checks = {f"{CHECK}{check}": table.checks[check] for check in table.checks if location}
    properties = ", ".join(f"'{key}' = {_quoted(value)}" for key, value in (table.properties | checks).items())
    return (
        f"CREATE TABLE IF NOT EXISTS {name} ({table.ddl()}) USING DELTA{location} "
        f"COMMENT '{table.comment}' TBLPROPERTIES ({properties}){clustered}"
    )


def _is_written(folder: Path) -> bool:
    """Whether a folder holds a Delta table.

    A log without a commit is either another process's that creates the table just now, which is waited for, or what was
    left when one was killed at it: Delta would take neither table nor empty folder for it, so it is removed.
    """
    log = folder / "_delta_log"
    while log.is_dir():
        if any(log.glob("[0-9]*.json")) or any(log.glob("[0-9]*.parquet")):
            return True
        with suppress(FileNotFoundError):  # another process has removed it meanwhile
            if time.time() - log.stat().st_mtime > CREATED_IN:
                logger.warning("removing %s: it was begun %s seconds ago or more, and has no commit", log, CREATED_IN)
                shutil.rmtree(log)
            else:
                time.sleep(0.1)
    return False


def _quoted(value: Path | str) -> str:
    escaped = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def table_id(spark: SparkSession, platform: Platform, table: Table) -> str:
    """Delta's own id of a table: a table dropped and created again has another."""
    return str(spark.sql(f"DESCRIBE DETAIL {platform.table(table.name)}").head()["id"])  # type: ignore[index]
