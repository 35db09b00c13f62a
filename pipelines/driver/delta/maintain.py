"""Maintenance of the Delta tables: adding missing columns and constraints, compaction (OPTIMIZE) and VACUUM.

Maintenance changes no row, so shards that are pinned to a table version stay valid. `versions.MAINTENANCE_OPERATIONS`
lists the Delta operations of all maintenance commits. A stage that writes at the same time may conflict with OPTIMIZE.
After three conflicts, maintenance skips the table until the next maintenance run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from pyspark.sql import Row, SparkSession
from pyspark.sql import functions as F

from pipelines.driver.delta.retry import CONFLICTS
from pipelines.driver.delta.settings import uncompressed_parquet, vacuum_logging
from pipelines.driver.delta.spark_errors import translate_spark_errors
from pipelines.driver.delta.tables import add_checks, ensure_tables
from pipelines.errors import UserError
from pipelines.formats.tables import TABLES
from pipelines.platform import Platform
from vlm.config import Config

logger = logging.getLogger(__name__)

MIN_RETAIN_HOURS = 168
"""Minimum retention time of old table versions. Delta also requires one week, because jobs may still read old files."""
ATTEMPTS = 3


class TableMaintenance(Config):
    """Report on the maintenance of one table.
    Attributes:
        table: full name of the table.
        checks_added: names of the constraints that were missing and have been added.
        rewritten: number of small files that OPTIMIZE replaced.
        written: number of files that OPTIMIZE wrote to replace the small files.
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


def maintain(spark: SparkSession, platform: Platform, retain_hours: int = MIN_RETAIN_HOURS) -> MaintainReport:
    """Upgrade, compact and vacuum every table.

    Args:
        spark: Spark session.
        platform: platform that stores the tables.
        retain_hours: retention time in hours. VACUUM keeps the files of all table versions within the retention time.

    Raises:
        UserError: `retain_hours` is below MIN_RETAIN_HOURS.
        StageFailed: Spark failed.
    """
    if retain_hours < MIN_RETAIN_HOURS:
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
            maintained.append(_maintain_table(spark, name, table.checks, retain_hours))
    return MaintainReport(tables=tuple(maintained), seconds=round(time.monotonic() - started, 3))


def _maintain_table(spark: SparkSession, name: str, checks: Mapping[str, str], retain_hours: int) -> TableMaintenance:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            added = add_checks(spark, name, checks)
            optimized = spark.sql(f"OPTIMIZE {name}").collect()[0]["metrics"]
            break
        except CONFLICTS as error:
            logger.info("table %s: OPTIMIZE conflicted with another writer, attempt %d of %d", name, attempt, ATTEMPTS)
            if attempt == ATTEMPTS:
                return TableMaintenance(table=name, postponed=str(error).partition("\n")[0][:300])
    with vacuum_logging(spark):
        spark.sql(f"VACUUM {name} RETAIN {retain_hours} HOURS").collect()
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


def _count_removed(spark: SparkSession, name: str) -> int:
    """Return the number of files that the last VACUUM deleted, according to the table history."""
    ended = spark.sql(f"DESCRIBE HISTORY {name} LIMIT 5").filter(F.col("operation") == "VACUUM END")
    commits = ended.orderBy(F.desc("version")).select("operationMetrics").collect()
    return int(commits[0]["operationMetrics"]["numDeletedFiles"]) if commits else 0
