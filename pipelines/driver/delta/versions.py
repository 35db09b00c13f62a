"""Functions for table versions: find the version that last changed a source, and make Delta skip outdated writes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from deltalake import DeltaTable
from deltalake.exceptions import DeltaError
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.driver.delta.commits import MIGRATION_NOTE, history_id, log_folder, with_time
from pipelines.driver.delta.on_disk import open_on_disk
from pipelines.driver.delta.settings import spark_settings
from pipelines.formats.delta_files import commit_id, is_supported, local_folder
from pipelines.formats.table_schema import Table
from pipelines.formats.tables import SAMPLES
from pipelines.platform import Platform

NOTE_PREFIX = "lakesight ingest "
NOTE_CONF = "spark.databricks.delta.commitInfo.userMetadata"
TXN_CONF = "spark.databricks.delta.write.txn"

MAINTENANCE_OPERATIONS = frozenset(
    {
        *("OPTIMIZE", "VACUUM START", "VACUUM END", "CLUSTER BY", "ADD COLUMNS", "ADD CONSTRAINT", "DROP CONSTRAINT"),
        *("SET TBLPROPERTIES", "UNSET TBLPROPERTIES", "UPGRADE PROTOCOL", "REORG", "COMPUTE STATS"),
    }
)
"""Delta operations whose commits change no row."""


COMMIT = ("userMetadata", "operationParameters")
"""Fields of a commit that this module reads, in addition to the operation, to decide whether the commit may have
changed rows of a source."""
NOTE_IN_CONDITION = re.compile(rf"= '?({NOTE_PREFIX}[\w.-]+)")
"""Pattern that finds the text `lakesight ingest SOURCE` (the note of a source) in the condition of a MERGE.

A MERGE takes no user metadata, so `note_condition` puts the note into the condition, which Delta stores in the table
history.
"""


class TableVersions(NamedTuple):
    """Two versions of a table: the newest version, and the last version that may have changed rows of a source.

    Attributes:
        newest: newest version of the table.
        last_change: newest version that may have changed a row of the source. For table `samples`, last_change is the
            dataset_version.
        commit: id of the commit that made `last_change`.
    """

    newest: int
    last_change: int
    commit: str | None


def newest_version(spark: SparkSession, name: str, location: Path | str | None = None) -> int:
    """Return the newest version of a table. If the table is in a local folder, no Spark query is needed.

    Args:
        spark: Spark session.
        name: name of the table in SQL.
        location: folder or URL of the table, or None if a catalog manages the table.

    Raises:
        AnalysisException: there is no such Delta table.
    """
    folder = log_folder(location)
    if folder is not None and is_supported(folder):
        with suppress(DeltaError):  # Spark gives the reason why there is no table
            return DeltaTable(folder, without_files=True).version()
    return int(spark.sql(f"DESCRIBE HISTORY {name} LIMIT 1").collect()[0]["version"])


def read_versions(spark: SparkSession, platform: Platform, source: str, table: Table = SAMPLES) -> TableVersions:
    """Read the newest version of a table, and the version that last changed a source (the pinned version).

    The table holds the rows of all sources. An ingest of any source creates a new table version. If shards were pinned
    to the newest version, an ingest of one source would make the shards of all sources stale. Each ingest writes a note
    with the name of its source into its commit (`note_options`, `note_condition`), and this function skips commits of
    other sources and maintenance commits. A commit without a note, such as a DELETE by hand, counts as a change of
    every source. The oldest commit that Delta still keeps also counts as a change. The pinned version may therefore be
    newer than the last change of the source, but never older.

    Both version numbers come from one read of the table history, so rows of `source` are equal at `newest` and at
    `last_change`.
    """
    if (opened := open_on_disk(platform, table)) is not None:
        return read_versions_of_files(opened, source)
    history = with_time(spark.sql(f"DESCRIBE HISTORY {platform.table(table.name)}"), *COMMIT)
    commits = {row["version"]: row.asDict() for row in history.collect()}
    newest, last_change = _select_versions([*commits.values()], source)
    return TableVersions(newest, last_change, history_id(commits[last_change]))


def read_versions_of_files(table: DeltaTable, source: str) -> TableVersions:
    """Read the same versions as `read_versions`, but without Spark, from a table in a local folder."""
    commits = [{name: commit.get(name) for name in ("version", "operation", *COMMIT)} for commit in table.history()]
    newest, last_change = _select_versions(commits, source)
    return TableVersions(newest, last_change, commit_id(local_folder(table), last_change))


def _select_versions(commits: list[dict[str, Any]], source: str) -> tuple[int, int]:
    """Return the newest version, and the newest version that may have changed a row of `source`."""
    commits.sort(key=lambda commit: int(commit["version"]), reverse=True)
    changed = (
        c["version"] for c in commits if c["operation"] not in MAINTENANCE_OPERATIONS and _may_change(source, _note(c))
    )
    return commits[0]["version"], next(changed, commits[-1]["version"])


def _note(commit: dict[str, Any]) -> str | None:
    """Return the note that the writer of a commit has stored: the user metadata, or a text in a MERGE's condition."""
    note: str | None = commit["userMetadata"]
    if note is not None or commit["operation"] != "MERGE":
        return note
    found = NOTE_IN_CONDITION.search((commit["operationParameters"] or {}).get("predicate") or "")
    return found and found[1]


def _may_change(source: str, note: str | None) -> bool:
    """Return whether a commit with this note may have changed rows of `source`."""
    if note == MIGRATION_NOTE:
        return False
    return note is None or not note.startswith(NOTE_PREFIX) or note == source_note(source)


def source_note(source: str) -> str:
    """Return the note of a commit that changes rows of `source` only."""
    return f"{NOTE_PREFIX}{source}"


def note_condition(source: str) -> str:
    """Return an SQL condition that is true for all rows of `source` and contains the note of the source, for a MERGE.

    A MERGE takes no user metadata, but Delta stores the condition of a MERGE in the table history.
    """
    return f"concat('{NOTE_PREFIX}', target.source) = '{source_note(source)}'"


def note_options(source: str) -> dict[str, str]:
    """Return the options with which a write to a Delta table stores the note of its source in the commit."""
    return {"userMetadata": source_note(source)}


def guarded_options(source: str, version: int) -> dict[str, str]:
    """Return write options with which Delta skips a write if another writer has committed first for the same source.

    The options use Delta's idempotent writes. `txnAppId` contains the name of the source. `txnVersion` is `version`,
    which is the last table version that had changed the source when the write was planned. Delta skips a write whose
    `txnVersion` is not above the last committed `txnVersion` of the source. If two writers planned at the same version,
    the first writer commits, and Delta skips the write of the second writer.
    """
    return {**note_options(source), "txnAppId": source_note(source), "txnVersion": str(version)}


def rows_of_source(spark: SparkSession, table: str, source: str) -> DataFrame:
    """Return the rows of a source at the newest version of a table.

    Shards are pinned to the table version that last changed their source. This function reads the newest table version
    instead, because VACUUM may have removed files of the pinned version. If an ingest has changed the source after the
    shards were written, the returned rows may lack a picture of the shards. Call this function just before the rows are
    read, because a DataFrame keeps reading the table version at which the DataFrame was created.
    """
    return spark.table(table).filter(F.col("source") == source)


@contextmanager
def commit_note(spark: SparkSession, note: str) -> Iterator[None]:
    """Write `note` into the user metadata of the Delta commits that are made in the block.

    Raises:
        AnalysisException: the session refuses to change Spark settings.
    """
    with spark_settings(spark, {NOTE_CONF: note}, required=True):
        yield


@contextmanager
def skip_if_changed_since(spark: SparkSession, source: str, version: int) -> Iterator[None]:
    """Make Delta skip a MERGE in the block if another writer has committed first for the same source.

    `guarded_options` does the same for other writes. A MERGE takes no options, so this function changes Spark settings.
    If the session refuses the settings, Delta does not skip the MERGE. The WHEN clauses of the MERGE must therefore
    leave out rows that have changed.
    """
    with spark_settings(spark, {f"{TXN_CONF}AppId": source_note(source), f"{TXN_CONF}Version": str(version)}):
        yield
