"""Maintenance of the Delta tables: adding missing columns and constraints, compaction (OPTIMIZE) and VACUUM.

Maintenance changes no row, so shards that are pinned to a table version stay valid. `versions.MAINTENANCE_OPERATIONS`
lists the Delta operations of all maintenance commits. A stage that writes at the same time may conflict with OPTIMIZE.
After three conflicts, maintenance skips the table until the next maintenance run.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Mapping

from pyspark.sql import Row, SparkSession
from pyspark.sql import functions as F

from pipelines.driver.delta.retry import CONFLICTS
from pipelines.driver.delta.settings import spark_settings, uncompressed_parquet, vacuum_logging
from pipelines.driver.delta.spark_errors import RETENTION, translate_spark_errors
from pipelines.driver.delta.tables import add_checks, ensure_tables, table_properties
from pipelines.errors import UserError
from pipelines.formats.tables import TABLES
from pipelines.platform import Platform
from vlm.config import Config

logger = logging.getLogger(__name__)

MIN_RETAIN_HOURS = 168
"""Minimum retention time of old table versions, in hours. Delta requires at least one week, because jobs may still read
old files."""
ATTEMPTS = 3

LOG_RETENTION = "delta.logRetentionDuration"
"""Table property with the time for which Delta keeps the table history. Delta's default is DEFAULT_LOG_HOURS."""
DEFAULT_LOG_HOURS = 30 * 24
HOURS = {"week": 168, "day": 24, "hour": 1, "minute": 1 / 60, "second": 1 / 3600}
"""Dict from a unit of time, which `_hours` finds in a table property, to the length of the unit in hours."""

CLUSTERING = "spark.databricks.delta.optimize.clustering.mergeStrategy.minCubeSize."
FULL_GROUP_BYTES = 2**30
"""OPTIMIZE does not write a group of clustered files again if the group has at least this size, in bytes.

OPTIMIZE of a clustered table writes its files in groups. OPTIMIZE writes all groups below this size again, together
with the new files. With Delta's default of 100 GiB, each OPTIMIZE would write a whole table of up to 100 GiB again.
"""
GROUP_BYTES = 5 * 2**29
"""Largest size in bytes of a group that OPTIMIZE writes. OPTIMIZE ends a group before the file with which the group
would exceed this size. A file has at most about 1 GiB, so every group except the last one reaches FULL_GROUP_BYTES.
"""


class TableMaintenance(Config):
    """Report on the maintenance of one table.

    Attributes:
        table: full name of the table.
        checks_added: names of the constraints that were missing and have been added.
        rewritten: number of files that OPTIMIZE replaced by larger files.
        written: number of larger files that OPTIMIZE wrote.
        removed: number of files that VACUUM deleted because no table version within the retention time uses them.
        files: number of files of the newest table version after the maintenance.
        bytes: total size of the files of the newest table version after the maintenance, in bytes.
        postponed: reason why maintenance was skipped until the next run, or None if maintenance was not skipped.
    """

    table: str
    checks_added: tuple[str, ...] = ()
    rewritten: int = 0
    written: int = 0
    removed: int = 0
    files: int = 0
    bytes: int = 0
    postponed: str | None = None


class MaintainReport(Config):
    """Report on the maintenance of every table, and the duration in seconds."""

    tables: tuple[TableMaintenance, ...]
    seconds: float


def maintain(spark: SparkSession, platform: Platform, retain_hours: int | None = None) -> MaintainReport:
    """Upgrade, compact and vacuum every table.

    Args:
        spark: Spark session.
        platform: platform that stores the tables.
        retain_hours: new retention time of the tables in hours, or None to keep the retention time of each table.
            VACUUM keeps the files of all table versions within the retention time.

    Raises:
        UserError: `retain_hours` is below MIN_RETAIN_HOURS.
        StageFailed: Spark failed.
    """
    if retain_hours is not None and retain_hours < MIN_RETAIN_HOURS:
        raise UserError(
            "the retention time of old table versions is too short",
            where="--retain-hours",
            got=f"{retain_hours} hours",
            fix=f"set at least {MIN_RETAIN_HOURS} hours, because a running job may read an older table version",
        )
    started = time.monotonic()
    ensure_tables(spark, platform)
    maintained = []
    for table in TABLES:
        name = platform.table(table.name)
        with translate_spark_errors("a table could not be maintained", where=name), uncompressed_parquet(spark):
            maintained.append(maintain_table(spark, name, table.checks, retain_hours))
    return MaintainReport(tables=tuple(maintained), seconds=round(time.monotonic() - started, 3))


def maintain_table(
    spark: SparkSession, name: str, checks: Mapping[str, str], retain_hours: int | None
) -> TableMaintenance:
    """Add missing constraints, set the retention time, and run OPTIMIZE and VACUUM on one table.

    Args:
        spark: Spark session.
        name: name of the table in SQL.
        checks: SQL conditions of the CHECK constraints, by name of the constraint.
        retain_hours: new retention time in hours, or None to keep the retention time of the table.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            added = add_checks(spark, name, checks)
            if retain_hours is not None:
                _set_retention(spark, name, retain_hours)
            optimized = _optimize(spark, name)
            break
        except CONFLICTS as error:
            logger.info("table %s: OPTIMIZE conflicted with another writer, attempt %d of %d", name, attempt, ATTEMPTS)
            if attempt == ATTEMPTS:
                return TableMaintenance(table=name, postponed=str(error).partition("\n")[0][:300])
    with vacuum_logging(spark):
        # Delta 4.1 and later ignores the clause RETAIN, so the retention time is a property of the table.
        spark.sql(f"VACUUM {name}").collect()
    detail: Row = spark.sql(f"DESCRIBE DETAIL {name}").collect()[0]
    return TableMaintenance(
        table=name,
        checks_added=added,
        rewritten=optimized["numFilesRemoved"],
        written=optimized["numFilesAdded"],
        removed=_count_removed(spark, name),
        files=detail["numFiles"],
        bytes=detail["sizeInBytes"],
    )


def _set_retention(spark: SparkSession, name: str, hours: int) -> None:
    """Set the retention time of a table's old files, unless the table has this retention time already.

    Delta must keep the table history at least as long as the files, so a shorter retention time of the history is
    extended.
    """
    existing = table_properties(spark, name)
    wanted = {RETENTION: f"interval {hours} hours"}
    log = existing.get(LOG_RETENTION)
    if (DEFAULT_LOG_HOURS if log is None else _hours(log)) < hours:
        wanted[LOG_RETENTION] = f"interval {hours} hours"
    if not wanted.items() <= existing.items():
        properties = ", ".join(f"'{key}' = '{value}'" for key, value in wanted.items())
        spark.sql(f"ALTER TABLE {name} SET TBLPROPERTIES ({properties})")


def _hours(interval: str) -> float:
    """Return the length in hours of a time in a table property, such as `interval 30 days` or `interval '90' day`.

    If the text has no number with a unit in HOURS, the function returns infinity. `_set_retention` then keeps the
    existing time, which may be longer than the new time.
    """
    parts = re.findall(rf"'?(\d+)'?\s*({'|'.join(HOURS)})", interval.lower())
    return sum(int(number) * HOURS[unit] for number, unit in parts) if parts else math.inf


def _optimize(spark: SparkSession, name: str) -> Row:
    """Compact the small files of a table. Return the metrics of OPTIMIZE."""
    sizes = {f"{CLUSTERING}threshold": str(FULL_GROUP_BYTES), f"{CLUSTERING}targetCubeSize": str(GROUP_BYTES)}
    with spark_settings(spark, sizes):
        metrics: Row = spark.sql(f"OPTIMIZE {name}").collect()[0]["metrics"]
    return metrics


def _count_removed(spark: SparkSession, name: str) -> int:
    """Return the number of files that the last VACUUM deleted, or 0 if the last five commits have no VACUUM."""
    ended = spark.sql(f"DESCRIBE HISTORY {name} LIMIT 5").filter(F.col("operation") == "VACUUM END")
    commits = ended.orderBy(F.desc("version")).select("operationMetrics").collect()
    return int(commits[0]["operationMetrics"]["numDeletedFiles"]) if commits else 0
