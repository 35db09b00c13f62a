"""Small things every stage asks of a Spark session: tables that exist, versions of them, and bounded Arrow batches.

The session itself comes from `Platform.open_spark`; nothing here starts one.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from py4j.protocol import Py4JJavaError  # type: ignore[import-untyped]
from pyspark.errors import AnalysisException, PySparkException
from pyspark.sql import DataFrame, SparkSession

from pipelines.errors import StageFailed, UserError
from pipelines.platform import Platform
from pipelines.tables import SAMPLES, TABLES, Table

logger = logging.getLogger(__name__)

MAX_BATCH_BYTES = 16 * 2**20
MAX_BATCH_ROWS = 32
NOTE = "lakesight ingest "
NOTE_CONF = "spark.databricks.delta.commitInfo.userMetadata"
TXN_CONF = "spark.databricks.delta.write.txn"
UPKEEP = frozenset(
    {
        *("OPTIMIZE", "VACUUM START", "VACUUM END", "CLUSTER BY", "ADD COLUMNS", "ADD CONSTRAINT", "DROP CONSTRAINT"),
        *("SET TBLPROPERTIES", "UNSET TBLPROPERTIES"),
    }
)
"""Commits that change no row."""

CHECK = "delta.constraints."
"""What the property of a table begins with that holds a check."""

CREATED_IN = 10
"""Seconds from the folder of a table's log to its first commit, at most."""

DIED = re.compile(r"Python worker exited unexpectedly|ExecutorLostFailure|^(?:Caused by: )?MemoryError", re.MULTILINE)


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


class Versions(NamedTuple):
    """Versions of a table: the newest, and the last that changed a row of a source (of `samples`: dataset_version)."""

    newest: int
    changed: int


def versions(spark: SparkSession, platform: Platform, source: str, table: Table = SAMPLES) -> Versions:
    """Where `samples` is, and the version to pin a source to; or another table that all sources share.

    All sources share one table, so its newest version moves when any of them is ingested; a pin to that would make
    every source's shards stale. Each ingest notes its source in its commit (`commit_note`), and this walks back over
    the commits of other sources and over upkeep. A commit without a note (a DELETE by hand) counts as a change, and so
    does the oldest commit once Delta has expired those before it: the pin may be later than need be, never earlier
    than right. Both come from one look at the history, so rows of `source` at `newest` are those at `changed`.
    """
    history = spark.sql(f"DESCRIBE HISTORY {platform.table(table.name)}")
    commits = history.select("version", "operation", "userMetadata").collect()
    commits.sort(key=lambda commit: commit["version"], reverse=True)
    changed = (
        c["version"] for c in commits if c["operation"] not in UPKEEP and _may_concern(source, c["userMetadata"])
    )
    return Versions(commits[0]["version"], next(changed, commits[-1]["version"]))


def _may_concern(source: str, note: str | None) -> bool:
    return note is None or not note.startswith(NOTE) or note == note_of(source)


def note_of(source: str) -> str:
    """What a commit that changes rows of `source`, and of no other, says in its user metadata."""
    return f"{NOTE}{source}"


@contextmanager
def commit_note(spark: SparkSession, note: str) -> Iterator[None]:
    """Write `note` into the user metadata of the Delta commits made inside."""
    with _settings(spark, {NOTE_CONF: note}):
        yield


@contextmanager
def since(spark: SparkSession, source: str, version: int) -> Iterator[None]:
    """Have Delta skip a write inside if a commit of `source` came after `version`, the last to change it when planned.

    Delta notes a number for the source with each such commit, and skips a write whose number is not above the one that
    is noted. Writers that planned at the same version have the same number: the first of them commits.
    """
    with _settings(spark, {f"{TXN_CONF}AppId": note_of(source), f"{TXN_CONF}Version": str(version)}):
        yield


@contextmanager
def bounded_batches(spark: SparkSession) -> Iterator[None]:
    """Bound the batches that queries run inside read from Parquet, and the Arrow batches that Python workers receive.

    Spark's default of 10,000 rows is 17 GB of megapixel pictures. Spark 4.1 and later also obey the bound in bytes;
    4.0 knows only the bound in rows, which is therefore small: 32 rows of the largest usual pictures are 50 MB.
    """
    with _settings(
        spark,
        {
            "spark.sql.parquet.columnarReaderBatchSize": str(MAX_BATCH_ROWS),
            "spark.sql.execution.arrow.maxRecordsPerBatch": str(MAX_BATCH_ROWS),
            "spark.sql.execution.arrow.maxBytesPerBatch": str(MAX_BATCH_BYTES),
        },
    ):
        yield


@contextmanager
def stored_as_they_are(spark: SparkSession) -> Iterator[None]:
    """Write pictures and payloads inside without compressing them again, or looking for two that are the same.

    A row of 50 MB would be copied for each.
    """
    settings = {"spark.sql.parquet.compression.codec": "uncompressed"}
    with _settings(spark, settings | {f"parquet.enable.dictionary#{name}": "false" for name in ("image", "payload")}):
        yield


@contextmanager
def logged_vacuum(spark: SparkSession) -> Iterator[None]:
    """Have VACUUM say in the table's history what it did."""
    with _settings(spark, {"spark.databricks.delta.vacuum.logging.enabled": "true"}):
        yield


def filtered(frame: DataFrame, condition: str, *, where: str) -> DataFrame:
    """The rows that meet a user's SQL condition; all of them where it is empty.

    Raises:
        UserError: it is no SQL on these columns. `where` says where it was written.
    """
    try:
        return frame.filter(condition) if condition else frame
    except AnalysisException as error:  # a ParseException is one too
        raise UserError(
            "the condition cannot be used",
            where=where,
            got=f"{condition} ({str(error).strip().splitlines()[0]})",
            fix=f"write SQL on these columns: {', '.join(frame.columns)}",
        ) from None


@contextmanager
def spark_failures(what: str, *, where: str) -> Iterator[None]:
    """Tell what fails in Spark inside as one paragraph; the JVM's and the workers' traces hang on as the cause.

    Raises:
        StageFailed: Spark, an executor or a Python worker failed.
    """
    try:
        yield
    except (PySparkException, Py4JJavaError) as error:
        named = re.findall(r"^(?:: |Caused by: )?([\w.]+(?:Error|Exception|Failed): .+)$", str(error), re.MULTILINE)
        got = named[-1] if named else str(error).strip().partition("\n")[0]
        fix = "correct the cause and run the command again: what is done stays done, nothing is doubled"
        raise StageFailed(what, where=where, got=got[:500], fix=fix) from error


def worker_died(error: Exception) -> bool:
    """Whether Spark failed because a Python worker, or an executor, ended without a word or for want of memory."""
    return isinstance(error, (PySparkException, Py4JJavaError)) and bool(DIED.search(str(error)))


@contextmanager
def _settings(spark: SparkSession, values: dict[str, str]) -> Iterator[None]:
    before = {key: spark.conf.get(key, None) for key in values}
    for key, value in values.items():
        spark.conf.set(key, value)
    try:
        yield
    finally:
        for key, earlier in before.items():
            if earlier is None:
                spark.conf.unset(key)
            else:
                spark.conf.set(key, earlier)
