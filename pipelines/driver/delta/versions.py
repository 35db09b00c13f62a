"""Versions of a table that many sources share: the last change of a source, and writes that a newer change cancels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from pyspark.sql import SparkSession

from pipelines.driver.delta.settings import spark_settings
from pipelines.formats.tables import SAMPLES, Table
from pipelines.platform import Platform

NOTE_PREFIX = "lakesight ingest "
NOTE_CONF = "spark.databricks.delta.commitInfo.userMetadata"
TXN_CONF = "spark.databricks.delta.write.txn"

MAINTENANCE_OPERATIONS = frozenset(
    {
        *("OPTIMIZE", "VACUUM START", "VACUUM END", "CLUSTER BY", "ADD COLUMNS", "ADD CONSTRAINT", "DROP CONSTRAINT"),
        *("SET TBLPROPERTIES", "UNSET TBLPROPERTIES"),
    }
)
"""Operations whose commits change no row."""


class TableVersions(NamedTuple):
    """Versions of a table for one source.

    Attributes:
        newest: latest version of the table.
        last_change: latest version that changed a row of the source; of `samples`, its dataset_version.
    """

    newest: int
    last_change: int


def read_versions(spark: SparkSession, platform: Platform, source: str, table: Table = SAMPLES) -> TableVersions:
    """Read the newest version of a table, and the version to pin a source to.

    All sources share one table. Its newest version grows when any source is ingested, so a pin to it would make every
    source's shards stale. Each ingest writes its source into its commit (`commit_note`); commits of other sources and
    maintenance commits are skipped. A commit without a note, such as a DELETE by hand, counts as a change. So does the
    oldest commit that Delta still keeps: the pin may be later than necessary, never too early.

    Both versions come from one read of the history, so rows of `source` are equal at `newest` and at `last_change`.
    """
    history = spark.sql(f"DESCRIBE HISTORY {platform.table(table.name)}")
    commits = history.select("version", "operation", "userMetadata").collect()
    commits.sort(key=lambda commit: commit["version"], reverse=True)
    changed = (
        c["version"]
        for c in commits
        if c["operation"] not in MAINTENANCE_OPERATIONS and _may_change(source, c["userMetadata"])
    )
    return TableVersions(commits[0]["version"], next(changed, commits[-1]["version"]))


def _may_change(source: str, note: str | None) -> bool:
    """Return whether a commit with this note may have changed rows of `source`."""
    return note is None or not note.startswith(NOTE_PREFIX) or note == source_note(source)


def source_note(source: str) -> str:
    """Return the user metadata of a commit that changes rows of `source` only."""
    return f"{NOTE_PREFIX}{source}"


@contextmanager
def commit_note(spark: SparkSession, note: str) -> Iterator[None]:
    """Write `note` into the user metadata of Delta commits made in the block."""
    with spark_settings(spark, {NOTE_CONF: note}):
        yield


@contextmanager
def skip_if_changed_since(spark: SparkSession, source: str, version: int) -> Iterator[None]:
    """Make Delta skip a write in the block if another such write to `source` was planned at `version` or later.

    Uses Delta's idempotent writes (txnAppId, txnVersion). The application is the source. The transaction version is
    `version`: the last change of the source when the write was planned. Delta skips a write whose transaction version
    is not above the last one committed. Of two writers that planned at the same version, the first commits.
    """
    with spark_settings(spark, {f"{TXN_CONF}AppId": source_note(source), f"{TXN_CONF}Version": str(version)}):
        yield
