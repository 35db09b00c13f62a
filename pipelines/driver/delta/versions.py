"""Versions of a table: which commit last changed the rows of a source, and writes that a newer commit makes void."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from pyspark.sql import SparkSession

from pipelines.driver.delta.settings import spark_settings
from pipelines.formats.tables import SAMPLES, Table
from pipelines.platform import Platform

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
    with spark_settings(spark, {NOTE_CONF: note}):
        yield


@contextmanager
def since(spark: SparkSession, source: str, version: int) -> Iterator[None]:
    """Have Delta skip a write inside if a commit of `source` came after `version`, the last to change it when planned.

    Delta notes a number for the source with each such commit, and skips a write whose number is not above the one that
    is noted. Writers that planned at the same version have the same number: the first of them commits.
    """
    with spark_settings(spark, {f"{TXN_CONF}AppId": note_of(source), f"{TXN_CONF}Version": str(version)}):
        yield
