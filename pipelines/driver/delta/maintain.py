"""Maintain: what every Delta table wants now and then. Columns and checks of this version, fewer and larger files, and
files that no reader needs any more taken off the disk.

Nothing here changes a row, and every commit is one of `session.UPKEEP`: shards that are pinned to a version stay found.
Beside a stage that writes at the same time, either its commit or ours is refused by Delta; ours is tried again, and at
last left to the next time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from pyspark.sql import Row, SparkSession
from pyspark.sql import functions as F

from pipelines.driver.delta.failures import spark_failures
from pipelines.driver.delta.retry import CONFLICTS
from pipelines.driver.delta.settings import logged_vacuum, stored_as_they_are
from pipelines.driver.delta.tables import add_checks, ensure_tables
from pipelines.errors import UserError
from pipelines.formats.tables import TABLES
from pipelines.platform import Platform
from vlm.config import Config

logger = logging.getLogger(__name__)

MIN_RETAIN_HOURS = 168
"""A week: Delta's own bound. A caption job or an evaluation that began before may still read the files."""
ATTEMPTS = 3


class TableUpkeep(Config):
    """What was done to one table.

    Attributes:
        table: its full name.
        checks_added: constraints that it lacked.
        rewritten: files that were put together.
        written: files that hold their rows now.
        removed: files that no version within the retention needs, taken off the disk.
        files: of the newest version, afterwards.
        bytes: of these files.
        postponed: why it was left to the next time; null when it was not.
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
    """What was done to every table, and in how many seconds."""

    tables: tuple[TableUpkeep, ...]
    seconds: float


def maintain(spark: SparkSession, platform: Platform, retain_hours: int = MIN_RETAIN_HOURS) -> MaintainReport:
    """Bring every table into order.

    Args:
        spark: the session.
        platform: where the tables are.
        retain_hours: files that versions of the last so many hours need stay.

    Raises:
        UserError: fewer hours than readers may need. StageFailed: Spark failed.
    """
    if retain_hours < MIN_RETAIN_HOURS:
        raise UserError(
            "files may not be removed so soon",
            where="--retain-hours",
            got=f"{retain_hours}",
            fix=f"at least {MIN_RETAIN_HOURS}: whoever reads an older version now would lose its files",
        )
    started = time.monotonic()
    ensure_tables(spark, platform)
    done = []
    for table in TABLES:
        name = platform.table(table.name)
        with spark_failures("a table could not be maintained", where=name), stored_as_they_are(spark):
            done.append(_maintained(spark, name, table.checks, retain_hours))
    return MaintainReport(tables=tuple(done), seconds=round(time.monotonic() - started, 3))


def _maintained(spark: SparkSession, name: str, checks: Mapping[str, str], retain_hours: int) -> TableUpkeep:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            added = add_checks(spark, name, checks)
            packed = spark.sql(f"OPTIMIZE {name}").collect()[0]["metrics"]
            break
        except CONFLICTS as error:
            logger.info("%s is being written to (attempt %d of %d)", name, attempt, ATTEMPTS)
            if attempt == ATTEMPTS:
                return TableUpkeep(table=name, postponed=str(error).partition("\n")[0][:300])
    with logged_vacuum(spark):
        spark.sql(f"VACUUM {name} RETAIN {retain_hours} HOURS").collect()
    detail: Row = spark.sql(f"DESCRIBE DETAIL {name}").collect()[0]
    return TableUpkeep(
        table=name,
        checks_added=added,
        rewritten=packed["numFilesRemoved"],
        written=packed["numFilesAdded"],
        removed=_removed(spark, name),
        files=detail["numFiles"],
        bytes=detail["sizeInBytes"],
    )


def _removed(spark: SparkSession, name: str) -> int:
    """Files that the last VACUUM took off the disk: it says so in its commit."""
    ended = spark.sql(f"DESCRIBE HISTORY {name} LIMIT 5").filter(F.col("operation") == "VACUUM END")
    commits = ended.orderBy(F.desc("version")).select("operationMetrics").collect()
    return int(commits[0]["operationMetrics"]["numDeletedFiles"]) if commits else 0
