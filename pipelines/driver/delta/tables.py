"""Creation and schema upgrade of the project's Delta tables. `Platform.open_spark` opens the session."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from deltalake import DeltaTable
from deltalake.exceptions import DeltaError
from pyspark.sql import SparkSession

from pipelines.config import short_hash
from pipelines.driver.delta.on_disk import open_on_disk
from pipelines.errors import UserError
from pipelines.formats import champion_captions
from pipelines.formats.delta_files import check_table_format, is_supported, open_delta
from pipelines.formats.format_version import FORMAT, PROPERTY, check_format, write_home_format
from pipelines.formats.table_schema import Table
from pipelines.formats.tables import TABLES
from pipelines.platform import Platform, is_connect, spark_errors

logger = logging.getLogger(__name__)

CONSTRAINT_PREFIX = "delta.constraints."
"""Prefix of the table properties in which Delta stores CHECK constraints."""

VIEW_PROPERTY = "lakesight.select"
"""Property of the view `champion_captions` with the hash of its SELECT statement."""

CREATION_TIMEOUT_S = 10
"""If a Delta log without a commit is at least this old, in seconds, it counts as a leftover of a killed process."""


def ensure_tables(spark: SparkSession, platform: Platform) -> None:
    """Create the Delta tables that do not exist, and add missing columns to tables of an earlier Lakesight version.

    On a laptop, Spark's catalog exists only in memory, so tables that an earlier process wrote are registered again.

    Raises:
        UserError: a newer release of Lakesight wrote a table, or the catalog's schema belongs to another home folder.
    """
    if platform.tables is not None:
        spark.sql(f"CREATE SCHEMA IF NOT EXISTS {platform.namespace} LOCATION {_quoted(platform.tables)}")
        if is_connect(spark) or spark.conf.get("spark.sql.catalogImplementation", "in-memory") == "hive":
            _check_schema(spark, platform.namespace, platform.tables)
    created = [ensure_table(spark, platform, table) for table in TABLES]
    if all(created):
        write_home_format(platform.root, FORMAT)


def _check_schema(spark: SparkSession, schema: str, folder: Path) -> None:
    """Check that a schema's tables are in `folder`, because several home folders may share a catalog.

    A Hive metastore and a Spark Connect server keep their catalog when a session ends.
    """
    found = urlsplit(spark.catalog.getDatabase(schema).locationUri).path
    if Path(unquote(found)) != folder.resolve():
        raise UserError(
            f"schema {schema} of the catalog belongs to another home folder",
            where=str(folder),
            got=found,
            fix="set LAKESIGHT_HOME to the folder that contains this schema, or use another metastore or Spark Connect "
            "server",
        )


def ensure_table(spark: SparkSession, platform: Platform, table: Table) -> bool:
    """Create one table, or add the columns that the existing table lacks. Return whether the table was created.

    Raises:
        UserError: a newer release of Lakesight wrote the table.
    """
    name, folder = platform.table(table.name), platform.tables and platform.tables / table.name
    created, exists = False, spark.catalog.tableExists(name)
    if not exists:
        location = f" LOCATION {_quoted(folder)}" if folder else ""
        if folder and _has_commits(folder):
            spark.sql(f"CREATE TABLE IF NOT EXISTS {name} USING DELTA{location}")
        else:
            spark.sql(_create(name, table, location))
            created = True
            if not folder:
                add_checks(spark, name, table.checks)
    if not is_supported(folder):
        check_format(int(table_properties(spark, name).get(PROPERTY, 0)), name)
    elif not (exists or created):
        # The format is read from the table's files, once per Spark session, because SHOW TBLPROPERTIES takes seconds.
        check_table_format(open_delta(folder))
    add_columns(spark, platform, table)
    return created


def open_tables(platform: Platform, *tables: Table) -> dict[str, DeltaTable] | None:
    """Open tables in local folders, and return a dict from name to table.

    Return None if a catalog manages the tables, or if a table does not exist, lacks a column or cannot be opened
    without Spark.

    Raises:
        UserError: a newer release of Lakesight wrote a table, or the file of the newest commit of a table is empty.
    """
    if platform.tables is None:
        return None
    opened = {}
    for table in tables:
        folder = platform.tables / table.name
        if not Path(folder, "_delta_log").is_dir():
            return None
        try:
            opened[table.name] = found = open_delta(folder)
        except DeltaError:
            return None
        check_table_format(found)
        if not {field.name for field in found.schema().fields} >= set(table.names):
            return None
    return opened


def ensure_champion_captions(spark: SparkSession, platform: Platform) -> None:
    """Create the view `champion_captions`, or change the SELECT statement of a view that another release has created.

    On a laptop, the view lasts as long as the Spark session. In a catalog, the view is permanent, and ALTER VIEW keeps
    the grants of the view. If this user may not change the view, log a warning.
    """
    name = platform.table(champion_captions.NAME)
    select = champion_captions.select(f"{platform.namespace}.")
    stamp = f"'{VIEW_PROPERTY}' = '{short_hash(select)}'"
    if not spark.catalog.tableExists(name):
        columns = ", ".join(f"{column} COMMENT '{text}'" for column, text in champion_captions.COLUMNS.items())
        comment = f"COMMENT '{champion_captions.COMMENT}'"
        spark.sql(f"CREATE VIEW IF NOT EXISTS {name} ({columns}) {comment} TBLPROPERTIES ({stamp}) AS {select}")
    elif table_properties(spark, name).get(VIEW_PROPERTY) != short_hash(select):
        try:
            spark.sql(f"ALTER VIEW {name} AS {select}")
            spark.sql(f"ALTER VIEW {name} SET TBLPROPERTIES ({stamp})")
        except spark_errors() as error:
            logger.warning(
                "the view %s has the SELECT statement of another release, and cannot be changed: %s. Run this command "
                "once as the owner of the view",
                name,
                str(error).strip().splitlines()[0],
            )


def add_checks(spark: SparkSession, name: str, checks: Mapping[str, str]) -> tuple[str, ...]:
    """Add the CHECK constraints that a table lacks. Return the names of the added constraints."""
    missing = missing_checks(spark, name, checks)
    for statement in missing.values():
        spark.sql(statement)
    return tuple(missing)


def missing_checks(spark: SparkSession, name: str, checks: Mapping[str, str]) -> dict[str, str]:
    """Return a dict from the name of each missing CHECK constraint of a table to the SQL that adds the constraint."""
    existing = table_properties(spark, name).keys() if checks else ()
    return {
        check: f"ALTER TABLE {name} ADD CONSTRAINT {check} CHECK ({checks[check]})"
        for check in checks
        if f"{CONSTRAINT_PREFIX}{check}" not in existing
    }


def add_columns(spark: SparkSession, platform: Platform, table: Table) -> None:
    """Add the columns that a table of an earlier Lakesight version lacks, as nullable columns."""
    for statement in missing_columns(spark, platform.table(table.name), table):
        spark.sql(statement)


def missing_columns(spark: SparkSession, name: str, table: Table) -> list[str]:
    """Return a list with the SQL statement that adds the missing columns, or an empty list if no column is missing."""
    existing = set(spark.table(name).columns)
    missing = [column.ddl() for column in table.columns if column.name not in existing]
    return [f"ALTER TABLE {name} ADD COLUMNS ({', '.join(missing)})"] if missing else []


def table_properties(spark: SparkSession, name: str) -> dict[str, str]:
    """Return the properties of a table."""
    return {row["key"]: row["value"] for row in spark.sql(f"SHOW TBLPROPERTIES {name}").collect()}


def _create(name: str, table: Table, location: str) -> str:
    clustered = f" CLUSTER BY ({', '.join(table.cluster_by)})" if table.cluster_by else ""
    # If the table is in a folder, this statement also adds its constraints. A catalog may require a separate statement
    # for each constraint.
    checks = {f"{CONSTRAINT_PREFIX}{check}": table.checks[check] for check in table.checks if location}
    properties = ", ".join(f"'{key}' = {_quoted(value)}" for key, value in (table.properties | checks).items())
    return (
        f"CREATE TABLE IF NOT EXISTS {name} ({table.ddl()}) USING DELTA{location} "
        f"COMMENT '{table.comment}' TBLPROPERTIES ({properties}){clustered}"
    )


def _has_commits(folder: Path) -> bool:
    """Return whether a folder holds a Delta table with at least one commit.

    A log folder without a commit has two possible causes. If another process is creating the table, this function waits
    for the first commit. If a process was killed while it was creating the table, this function removes the log folder.
    Delta cannot open a table whose log folder has no commit.
    """
    log = folder / "_delta_log"
    modified, watched_since = 0.0, time.monotonic()
    while log.is_dir():
        if any(log.glob("[0-9]*.json")) or any(log.glob("[0-9]*.parquet")):
            return True
        with suppress(FileNotFoundError):  # another process may have removed the log folder
            if modified != (modified := log.stat().st_mtime):
                watched_since = time.monotonic()
            # If the clock was set back, the modification time may be in the future. The time that this function has
            # waited therefore also counts.
            if max(time.time() - modified, time.monotonic() - watched_since) > CREATION_TIMEOUT_S:
                logger.warning(
                    "removing the log folder %s: it is at least %s seconds old and has no commit",
                    log,
                    CREATION_TIMEOUT_S,
                )
                shutil.rmtree(log)
            else:
                time.sleep(0.1)
    return False


def _quoted(value: Path | str) -> str:
    escaped = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def table_id(spark: SparkSession, platform: Platform, table: Table) -> str:
    """Return Delta's own id of a table. Delta's id changes when a table is dropped and created again."""
    if (opened := open_on_disk(platform, table)) is not None:
        return str(opened.metadata().id)
    return str(spark.sql(f"DESCRIBE DETAIL {platform.table(table.name)}").head()["id"])  # type: ignore[index]
